"""The command line: a preset or a TOML file gives the defaults, and every field of the config is an option."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Annotated

from yaongi.model import ModelConfig
from yaongi.train.config import Config, Running, Training, load_config

DEFAULT_PRESET = "yaongi-tiny"


def parse(arguments: Sequence[str]) -> Config:
    """Parse `arguments` into a configuration; `--help` or an unknown option ends the program.

    Raises:
        FileNotFoundError: there is no such preset or file.
        ValueError: a value doesn't fit, or tyro is not installed.
    """
    try:
        import tyro
    except ModuleNotFoundError as error:
        raise ValueError("train: the command line needs tyro: pip install tyro") from error
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    source = first.add_mutually_exclusive_group()
    source.add_argument("--preset", default=DEFAULT_PRESET)
    source.add_argument("--config")
    first.add_argument("--model.engram", dest="engram")
    chosen, rest = first.parse_known_args(arguments)
    defaults = load_config(chosen.config or chosen.preset)
    if chosen.engram not in (None, "none"):
        raise ValueError(f"train: --model.engram must be none, to leave Engram out, got {chosen.engram!r}")
    if chosen.engram == "none":
        defaults = dataclasses.replace(defaults, model=defaults.model.without_engram())

    def collect(
        model: ModelConfig = defaults.model,
        train: Annotated[Training, tyro.conf.arg(name="")] = defaults.train,
        run: Annotated[Running, tyro.conf.arg(name="")] = defaults.run,
    ) -> Config:
        return Config(defaults.preset, model, train, run)

    return tyro.cli(
        collect,
        args=rest,
        prog="python -m yaongi.train",
        description="Pretraining. --preset NAME (yaongi/presets) or --config FILE.toml gives the defaults below; "
        "--model.engram none leaves Engram out.",
    )
