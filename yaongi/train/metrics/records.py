"""`metrics.jsonl`, the authoritative record of a run: appended to, truncated at a resume, and read."""

import json
from pathlib import Path
from typing import IO, Any

from yaongi.files import read_json_lines, write_atomically


class Metrics:
    """A file of records, one JSON object per line, each with its `event` and the number of steps done."""

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        """Open nothing yet.

        Args:
            enabled: False in processes that must not write, because the first process does.
        """
        self.path, self._enabled = path, enabled
        self._file: IO[str] | None = None

    def cut(self, step: int) -> None:
        """Drop the records after `step`, and an incomplete last line. Call it before `write`."""
        if self._enabled and self.path.is_file():
            kept = [json.dumps(record) + "\n" for record in read_json_lines(self.path) if record["step"] <= step]
            write_atomically(self.path, "".join(kept).encode())

    def write(self, event: str, step: int, **values: Any) -> dict[str, Any]:
        """Append a record and return it; it is flushed to the system, though perhaps not to disk."""
        record = {"event": event, "step": step, **values}
        if self._enabled:
            self._file = self._file or self.path.open("a")
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        return record

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def plan_record(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the plan's record, or an empty one if there is none."""
    return next((r for r in records if r["event"] == "plan"), {})
