"""`python -m yaongi.train.report RUN [BENCHMARKS.json]`: one page on a run."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from yaongi import cli
from yaongi.train.report.page import write_report


@dataclass(frozen=True)
class Report:
    """Write `report.html` and `report.png` into the folder of a run."""

    run_folder: tyro.conf.Positional[Path]  # folder of a run
    benchmarks: tyro.conf.Positional[Path | None] = None  # JSON of pytest-benchmark: adds the kernels' panel

    def run(self) -> None:
        """Write the page and print where it is; raises ValueError or OSError with one line."""
        print(write_report(self.run_folder, self.benchmarks))


def main() -> None:
    """Parse the command line; a mistake is one line."""
    cli.run(tyro.cli(Report, prog="python -m yaongi.train.report").run)


if __name__ == "__main__":
    main()
