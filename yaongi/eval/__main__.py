"""`python -m yaongi.eval bpb`: measures of a trained model, a subcommand each."""

from collections.abc import Callable
from typing import Any

import tyro

from yaongi import cli
from yaongi.eval.bpb import Bpb

COMMANDS: dict[str, Callable[..., Any]] = {"bpb": Bpb}  # each has `run`


def main() -> None:
    """Run one subcommand; an error is one line on standard error, and exit code 1."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="python -m yaongi.eval", description="Measures of a trained model."
    )
    cli.run(command.run)


if __name__ == "__main__":
    main()
