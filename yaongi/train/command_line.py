"""The command line: a preset or a TOML file gives the defaults, and every field of the config is an option."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

from yaongi import cli
from yaongi.model.config import ModelConfig
from yaongi.presets import continuations, preset_names
from yaongi.train.config import Config, Running, Training, load_config

DEFAULT_PRESET = "yaongi-tiny"
DERIVED = {  # options of the model that training sets itself: what sets each
    "--model.vocab-size": "the tokenizer in the folder of --data",
    "--model.pad-token-id": "the tokenizer in the folder of --data",
    "--model.bos-token-id": "the tokenizer in the folder of --data",
    "--model.eos-token-id": "the tokenizer in the folder of --data",
    "--model.compressed-vocab-size": "--engram-compression and the tokenizer",
}
COUNTS = ("--tokens", "--batch-tokens", "--row-tokens")


def load_tyro() -> ModuleType:
    """Return the library of the command line. Raises ValueError if it is not installed."""
    try:
        import tyro
    except ModuleNotFoundError as error:
        raise ValueError("train: the command line needs tyro: pip install tyro") from error
    return tyro


def parse(arguments: Sequence[str]) -> Config:
    """Parse `arguments` into a configuration; `--help` or an unknown option ends the program.

    Raises:
        FileNotFoundError: there is no such preset or file.
        ValueError: a value doesn't fit, or tyro is not installed.
    """
    tyro = load_tyro()
    first = argparse.ArgumentParser("python -m yaongi.train", add_help=False, allow_abbrev=False)
    source = first.add_mutually_exclusive_group()
    source.add_argument("--preset", default=DEFAULT_PRESET)
    source.add_argument("--config")
    first.add_argument("--model.engram", dest="engram")
    first.add_argument("--init", type=Path)
    chosen, rest = first.parse_known_args(arguments)
    for option in (argument.partition("=")[0].replace("_", "-") for argument in rest):
        if option in DERIVED:
            raise ValueError(f"train: {option} must be left out: {DERIVED[option]} sets it")
    defaults = load_config(chosen.config or chosen.preset, chosen.init)
    if chosen.init is not None:
        rest += ["--init", str(chosen.init)]
    if chosen.engram not in (None, "none"):
        raise ValueError(f"train: --model.engram must be none, to leave Engram out, got {chosen.engram!r}")
    if chosen.engram == "none":
        defaults = dataclasses.replace(defaults, model=defaults.model.without_engram())

    def collect(
        preset: Annotated[str, tyro.conf.arg(help="preset that gives the defaults below")] = chosen.preset,
        config: Annotated[Path | None, tyro.conf.arg(help="TOML file that gives them instead")] = None,
        model: ModelConfig = defaults.model,
        train: Annotated[Training, tyro.conf.arg(name="")] = defaults.train,
        run: Annotated[Running, tyro.conf.arg(name="")] = defaults.run,
    ) -> Config:
        return Config(defaults.preset, model, train, run)

    return tyro.cli(
        collect,
        args=cli.with_digits(rest, COUNTS),
        prog="python -m yaongi.train",
        description=(
            f"Pretraining. Presets: {', '.join(preset_names())}; with --init also {', '.join(continuations())}. "
            "--model.engram none leaves Engram out."
        ),
    )
