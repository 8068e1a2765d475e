"""`python -m yaongi.train.report RUN [BENCHMARKS.json]`: one page about a run."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from yaongi import cli
from yaongi.train.report.page import write_report


@dataclass(frozen=True)
class Report:
    """Write `report.html` and `report.png` into the folder of a run."""

    run_folder: tyro.conf.Positional[Path]  # folder of the run, with its metrics.jsonl
    benchmarks: tyro.conf.Positional[Path | None] = None  # JSON file of pytest-benchmark: adds two panels on kernels

    def run(self) -> None:
        """Write the page and print its path. Raises ValueError or OSError with a message of one line."""
        print(write_report(self.run_folder, self.benchmarks))


def main() -> None:
    """Run the command; an error is one line."""
    cli.run(tyro.cli(Report, prog="python -m yaongi.train.report").run)


if __name__ == "__main__":
    main()
