"""`python -m yaongi.train --preset yaongi-tiny`: pretraining, on one device or under `torchrun`."""

import sys

from yaongi import cli
from yaongi.train.command_line import parse


def main() -> None:
    """Run the command; an error is one line."""
    cli.run(_run)


def _run() -> int:
    config = cli.parsed(parse)
    from yaongi.train.program import run

    return run(config, sys.argv[1:])


if __name__ == "__main__":
    main()
