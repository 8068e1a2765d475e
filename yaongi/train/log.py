"""What a run says: ``metrics.jsonl``, which is the truth, and a line or a progress bar for people."""

import json
import math
import sys
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from yaongi.data.files import write_atomically


class Metrics:
    """Appends records, each with its ``event`` and the number of steps done, one JSON object a line."""

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        """``enabled``: False where another process writes; then nothing is."""
        self.path, self._enabled = path, enabled
        self._file: IO[str] | None = None

    def cut(self, step: int) -> None:
        """Drop what was recorded after ``step``, and a last line that was never finished. Call it before ``write``."""
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


class Display:
    """Lines on standard output; on a terminal also a progress bar below them."""

    def __init__(self, steps: int, *, quiet: bool = False, console: Console | None = None) -> None:
        """``quiet``: say nothing, as all processes but the first."""
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("training", total=steps)

    def start(self, step: int) -> None:
        """Show the bar, ``step`` steps of it done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def step(self, record: dict[str, Any], steps: int) -> None:
        """Print a step's line."""
        self.say(console_line(record, steps))

    def say(self, text: str) -> None:
        """Print lines."""
        if self._quiet:
            return
        if self._console.is_terminal:
            self._console.print(text, markup=False)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a line on standard error."""
        if not self._quiet:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


def console_line(record: dict[str, Any], steps: int) -> str:
    """A step's record in one line."""
    done = record["step"]
    parts = [
        f"step {done}/{steps} ({100 * done / steps:.1f}%)",
        f"loss {record['loss']:.3f}",
        f"bpb {record['bpb']:.2f}",
        f"lr {scientific(record['lr'])} {record['phase']}",
        f"gnorm {record['gnorm']:.2f}",
        f"{short(record['tokens_per_second'])} tok/s",
        f"{significant(record['tflops'])} TFLOP/s",
        f"mem {record['memory'] / 1e9:.1f}G",
        f"data {100 * record['data_wait']:.1f}%",
    ]
    if "experts_cv" in record:
        parts.append(f"experts cv {record['experts_cv']:.2f} dead {record['experts_dead']}")
    return " | ".join([*parts, f"eta {duration(record['eta'])}"])


def scientific(value: float) -> str:
    """``2.0e-3``."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def significant(value: float) -> str:
    """Three digits: ``632``, ``41.8``, ``0.0312``."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def short(value: float) -> str:
    """``83k``, ``1.2M``, ``950``."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}" if value < 10 * limit else f"{value / limit:.0f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """``46h04m``, ``3m20s``, ``12s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
