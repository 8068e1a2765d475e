"""The command line: the folder of `--init` gives the model, and every field of the configuration is an option."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from yaongi import cli
from yaongi.model.config import PrecisionConfig, load_preset
from yaongi.train.command_line import COUNTS, DEFAULT_PRESET, load_tyro
from yaongi.train.config import Training, read_init
from yaongi.tune.config import TuneConfig, TuneRunning, TuneSettings, tuning_defaults

_RUNNING = TuneRunning()
BY_OBJECTIVE = {  # share of the steps for the warm-up, and settings
    "sft": (0.03, TuneSettings()),
    "dpo": (0.1, TuneSettings("dpo", epochs=1.0, lr_scale=0.01)),
}
_EPOCHS = ("--tokens", "--max-epochs")  # of the trainer's options, those in whose place --epochs is


def parse(arguments: Sequence[str]) -> TuneConfig:
    """Parse `arguments` into a configuration; `--help` or an unknown option ends the program.

    Raises:
        FileNotFoundError: there is no model at `--init`.
        ValueError: a value doesn't fit, or tyro is not installed.
    """
    tyro = load_tyro()
    first = argparse.ArgumentParser("python -m yaongi.tune", add_help=False, allow_abbrev=False)
    first.add_argument("--init")
    first.add_argument("--objective")
    chosen, _ = first.parse_known_args(arguments)
    for option in (argument.partition("=")[0].replace("_", "-") for argument in arguments):
        if option in _EPOCHS:
            raise ValueError(f"tune: {option} must be left out: --epochs sets how long it is")
    model, compression = load_preset(DEFAULT_PRESET), "paper"  # for --help
    if chosen.init is not None:
        model, trained = read_init(Path(chosen.init))
        compressed = model.compressed_vocab_size is not None
        compression = trained.get("engram_compression", "paper") if compressed else "none"
    elif not {"--help", "-h"} & set(arguments):
        raise ValueError("tune: --init must be a model folder or a run, got none")
    warmup, settings = BY_OBJECTIVE.get(chosen.objective, BY_OBJECTIVE["sft"])
    training = tuning_defaults(model, warmup, engram_compression=compression)

    def collect(
        precision: Annotated[PrecisionConfig, tyro.conf.arg(name="model.precision")] = model.precision,
        train: Annotated[Training, tyro.conf.arg(name="")] = training,
        run: Annotated[TuneRunning, tyro.conf.arg(name="")] = _RUNNING,
        tune: Annotated[TuneSettings, tyro.conf.arg(name="")] = settings,
    ) -> TuneConfig:
        scaled = {name: tune.lr_scale * getattr(train, name) for name in ("matrix_lr", "adam_lr")}
        tuned = dataclasses.replace(model, precision=precision)
        return TuneConfig(Path(run.init or "").name, tuned, dataclasses.replace(train, **scaled), run, tune)

    return tyro.cli(
        collect,
        args=cli.with_digits(arguments, COUNTS),
        prog="python -m yaongi.tune",
        description="Tuning on conversations or preferences, from the weights of --init, which is needed.",
    )
