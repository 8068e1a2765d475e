"""A line from each process that gets no further: whose differs from the others' is the cause.

If NCCL then waits too long, torch's flight recorder writes the last collectives of each process to files.
"""

import contextlib
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from yaongi.train.distributed.errors import place_of
from yaongi.train.run_folder import NCCL
from yaongi.world import World

LEAST = 120.0  # seconds without progress after which a line is printed,
STEPS = 10  # or the time of so many steps
POLL = 1.0


def record_collectives(out: Path) -> None:
    """Set where the flight recorder of several processes writes, unless the user has; call it before they join.

    Args:
        out: the run's folder.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    wanted = {"FR_BUFFER_SIZE": "2000", "FR_DUMP_TEMP_FILE": out / NCCL / "rank_", "NCCL_DUMP_ON_TIMEOUT": "1"}
    for name, value in wanted.items():
        os.environ.setdefault(f"TORCH_{name}", str(value))


class Watch:
    """A context in which a thread looks at the progress of training; with one process it does nothing."""

    def __init__(self, world: World, out: Path, progress: Callable[[], tuple[int, str]]) -> None:
        """Start nothing yet.

        Args:
            out: the run's folder.
            progress: returns the steps done, and what the process does.
        """
        self._world, self._progress = world, progress
        self._records = out / NCCL if world.device.type == "cuda" else None
        self._paused, self._end = False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="yaongi-watch", daemon=True)

    def __enter__(self) -> "Watch":
        if self._world.size > 1:
            if self._records is not None:
                self._records.mkdir(exist_ok=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Don't look within the block, whose progress is not known."""
        self._paused = True
        yield
        self._paused = False

    def _run(self) -> None:
        seen, since, said = self._progress(), time.monotonic(), False
        began, steps = since, deque[float](maxlen=32)  # when the step began, and the seconds of the last ones
        while not self._end.wait(POLL):
            now, moment = self._progress(), time.monotonic()
            if now[0] != seen[0]:
                steps.append((moment - began) / (now[0] - seen[0]))
                began = moment
            if now != seen or self._paused:
                seen, since, said = now, moment, False
            elif not said and moment - since > max(LEAST, STEPS * statistics.median(steps or [0.0])):
                self._say(now, moment - since)
                said = True

    def _say(self, progress: tuple[int, str], seconds: float) -> None:
        step, doing = progress
        where = f"rank {self._world.rank} ({place_of(self._world)})"
        what = f'no progress for {seconds:.0f} s in "{doing}", after step {step}'
        then = f"; if NCCL gives up, the last collectives are written to {self._records}"
        print(f"warning: {where}: {what}{then if self._records else ''}", file=sys.stderr, flush=True)
