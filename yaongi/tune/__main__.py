"""`python -m yaongi.tune --init RUN/model --data CHAT --out TUNED`: tuning, on one device or under `torchrun`."""

import sys

from yaongi import cli
from yaongi.tune.command_line import parse


def main() -> None:
    """Run the command; an error is one line."""
    cli.run(_run)


def _run() -> int:
    config = cli.parsed(parse)
    from yaongi.train.program import run
    from yaongi.tune.objectives import job_of

    return run(config, sys.argv[1:], job_of(config))


if __name__ == "__main__":
    main()
