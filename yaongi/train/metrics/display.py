"""Printed lines and the progress bar."""

import statistics
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from yaongi.train.formatting import duration, scientific, short, significant

COLUMNS = 100  # of a step's line
_LEAST = ("memory", "flops", "bpb", "fp8", "gnorm", "lr", "")  # what a line that is too long leaves out first
_SLOW = 0.01  # share of the median time by which a rank is longer from which it is shown
_MASKED = 0.95  # share of the tokens that are targets below which it is shown: pretraining predicts almost all
_WAIT = 0.01  # share of the time spent waiting for data from which it is shown


class Display:
    """Lines on standard output; on a terminal also a progress bar below them."""

    def __init__(self, steps: int, *, quiet: bool = False, console: Console | None = None) -> None:
        """Prepare the bar, which only a terminal gets.

        Args:
            quiet: print nothing, as in all processes but the first.
        """
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("training", total=steps)

    def start(self, step: int) -> None:
        """Show the bar with `step` steps done."""
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
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


def console_line(record: dict[str, Any], steps: int) -> str:
    """Format a step's record as one line of at most 100 columns; for that the parts that matter least are left out."""
    parts = {
        "step": f"step {record['step']}/{steps}",
        "loss": f"loss {record['loss']:.3f}",
        "bpb": f"bpb {record['bpb']:.2f}" if "bpb" in record else "",
        "lr": f"lr {scientific(record['lr'])}",
        "gnorm": f"gnorm {record['gnorm']:.2f}",
        "speed": f"{short(record['tokens_per_second'])} tok/s",
        "flops": f"{significant(record['tflops'])} TFLOP/s",
        "memory": f"{record['memory'] / 1e9:.1f}G",
    }
    if "accuracy" in record:
        parts["pairs"] = f"accuracy {100 * record['accuracy']:.0f}% margin {record['margin']:.2f}"
        parts["chosen"] = f"chosen {record['chosen']:.1f}"
    if record["data_wait"] >= _WAIT:
        parts["data"] = f"data {100 * record['data_wait']:.0f}%"
    if record.get("target_share", 1) < _MASKED:
        parts["targets"] = f"targets {100 * record['target_share']:.0f}%"
    if "fp8_saturated" in record:
        parts["fp8"] = f"fp8 saturated {100 * record['fp8_saturated']:.1f}%"
    if slowest := slowest_rank(record.get("rank_seconds", [])):
        parts["ranks"] = slowest
    if "experts_cv" in record:
        parts["experts"] = f"cv {record['experts_cv']:.2f}"
        if record["experts_dead"]:
            parts["experts"] += f" dead {record['experts_dead']}"
    parts["eta"] = f"eta {duration(record['eta'])}"
    for least in _LEAST:
        if len(line := " | ".join(filter(None, parts.values()))) <= COLUMNS:
            break
        parts.pop(least, None)
    return line


def slowest_rank(seconds: list[float]) -> str:
    """Say how much longer a rank's micro-batches take than the median, as in `slowest rank 5 +2.9%`, if it is much."""
    if not any(seconds):
        return ""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    over = seconds[slowest] / statistics.median(seconds) - 1
    return f"slowest rank {slowest} +{100 * over:.1f}%" if over >= _SLOW else ""
