"""`python -m yaongi.train.report RUN [BENCHMARKS.json]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from yaongi import cli
from yaongi.train.report.page import write_report


def main(arguments: Sequence[str]) -> int:
    """`python -m yaongi.train.report RUN_FOLDER [BENCHMARKS.json]`."""
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m yaongi.train.report RUN_FOLDER [BENCHMARKS.json]", file=sys.stderr)
        return 2
    cli.run(lambda: print(write_report(Path(arguments[0]), *map(Path, arguments[1:]))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
