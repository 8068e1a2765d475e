"""`python -m yaongi.train.report RUN [RUN …]`: one page about a run, or about several beside each other."""

import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from yaongi import cli
from yaongi.train.report.words import Language


@dataclass(frozen=True)
class Report:
    """Write a page about a run; of several runs the curves lie over each other."""

    run_folders: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs, each with its metrics.jsonl
    out: Path | None = None  # page to write; none: report.html in the first folder
    language: Language = "en"  # of the page
    watch: int = 0  # seconds after which the page is written again, and reloaded by the browser, until the runs end
    benchmarks: Path | None = None  # JSON file of pytest-benchmark: adds two panels on kernels

    def run(self) -> None:
        """Write the page and print its path. Raises ValueError or OSError with a message of one line."""
        from yaongi.train.report.run import Run

        if not self.run_folders:
            raise ValueError("report: run_folders must be one or more, got none")
        if self.watch < 0:
            raise ValueError(f"report: watch must be 0 or more, got {self.watch}")
        path = self._write(self.watch)
        print(path, flush=True)
        while self.watch:
            finished = all(Run.read(folder).is_finished for folder in self.run_folders)
            if not finished:
                time.sleep(self.watch)
            self._write(0 if finished else self.watch)
            if finished:
                return

    def _write(self, refresh: int) -> Path:
        from yaongi.train.report.page import write_report

        return write_report(self.run_folders, self.out, self.benchmarks, self.language, refresh)


def main() -> None:
    """Run the command; an error is one line."""
    cli.run(tyro.cli(Report, prog="python -m yaongi.train.report").run)


if __name__ == "__main__":
    main()
