"""`python -m yaongi.eval bpb|passkey|tasks|fetch|logickor|report`: measures of a trained model, a subcommand each."""

import os
import sys
from collections.abc import Callable
from typing import Any

import tyro

from yaongi import cli
from yaongi.eval.bpb import Bpb
from yaongi.eval.commands import Fetch, Report, Tasks
from yaongi.eval.logickor.command import Logickor
from yaongi.eval.long_context.command import Passkey

os.environ.setdefault("TQDM_DISABLE", "1")  # read when torch imports tqdm: a dozen bars of lm-eval and datasets
COMMANDS: dict[str, Callable[..., Any]] = {  # each has `run`
    "bpb": Bpb,
    "passkey": Passkey,
    "tasks": Tasks,
    "fetch": Fetch,
    "logickor": Logickor,
    "report": Report,
}


def main() -> None:
    """Run one subcommand; an error is one line on standard error, and exit code 1."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="python -m yaongi.eval",
        description="Measures of a trained model.",
        args=cli.with_digits(sys.argv[1:], ("--trained-tokens",)),
    )
    cli.run(command.run, interrupted="interrupted; run the same command to go on")


if __name__ == "__main__":
    main()
