"""A run as the report sees it: its records and its settings."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from yaongi.files import read_json, read_json_lines
from yaongi.train.metrics.records import plan_record
from yaongi.train.run_folder import CONFIG, METRICS

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """The records of a run's folder."""

    folder: Path
    records: Records

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run's folder.

        Raises:
            FileNotFoundError: there is no `metrics.jsonl`.
            ValueError: no step was recorded, or a line is damaged.
        """
        if not (folder / METRICS).is_file():
            raise FileNotFoundError(f"report: no {METRICS} in {folder}; train first")
        run = cls(folder, read_json_lines(folder / METRICS))
        if not run.all_steps:
            raise ValueError(f"report: no step is recorded in {folder / METRICS}")
        return run

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def of(self, event: str) -> Records:
        """Return the records of an event."""
        return [record for record in self.records if record["event"] == event]

    @cached_property
    def all_steps(self) -> Records:
        """The records of all steps, those without a loss too."""
        return self.of("step")

    @cached_property
    def steps(self) -> Records:
        """The records of the steps that have a loss."""
        return [record for record in self.all_steps if "loss" in record]

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The record of the plan; empty if there is none."""
        return plan_record(self.records)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration; empty if the folder holds none."""
        path = self.folder / CONFIG
        return read_json(path) if path.is_file() else {}

    @property
    def is_finished(self) -> bool:
        """Whether the last step of the plan is recorded."""
        return self.all_steps[-1]["step"] >= self.plan.get("steps", 0)

    def column(self, name: str, records: Records | None = None) -> np.ndarray:
        """Return a field of the steps, or of other records; NaN where one hasn't got it."""
        return np.array([r.get(name, np.nan) for r in (self.steps if records is None else records)], float)
