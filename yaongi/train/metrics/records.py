"""`metrics.jsonl`, which is the truth: written, cut back and read."""

import json
from pathlib import Path
from typing import IO, Any

from yaongi.files import write_atomically


class Metrics:
    """Appends records, each with its `event` and the number of steps done, one JSON object per line."""

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        """`enabled`: False where another process writes; then nothing is."""
        self.path, self._enabled = path, enabled
        self._file: IO[str] | None = None

    def cut(self, step: int) -> None:
        """Drop what was recorded after `step`, and a last line that was never finished. Call it before `write`."""
        if self._enabled and self.path.is_file():
            kept = [json.dumps(record) + "\n" for record in read_metrics(self.path) if record["step"] <= step]
            write_atomically(self.path, "".join(kept).encode())

    def write(self, event: str, step: int, **values: Any) -> dict[str, Any]:
        """Append a record; it is with the system, if not on disk, when this returns."""
        record = {"event": event, "step": step, **values}
        if self._enabled:
            self._file = self._file or self.path.open("a")
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        return record

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records; a last line without its end is left out.

    Raises:
        ValueError: a line in between is no JSON.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"log: line {number} of {path} is damaged: {error}") from error
    return records


def plan_record(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan's record; empty if there is none."""
    return next((r for r in records if r["event"] == "plan"), {})
