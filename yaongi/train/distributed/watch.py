"""A line from each process that gets no further: whose differs from the others' is the cause."""

import contextlib
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from yaongi.train.distributed.errors import place_of
from yaongi.world import World

LEAST = 120.0  # seconds without progress after which a line is printed,
STEPS = 10  # or the time of so many steps
POLL = 1.0


class Watch:
    """A context in which a thread looks at the progress of training; with one process it does nothing."""

    def __init__(self, world: World, progress: Callable[[], tuple[int, str]]) -> None:
        """Start nothing yet.

        Args:
            progress: returns the steps done, and what the process does.
        """
        self._world, self._progress = world, progress
        self._paused, self._end = False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="yaongi-watch", daemon=True)

    def __enter__(self) -> "Watch":
        if self._world.size > 1:
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
        print(f"warning: {where}: {what}", file=sys.stderr, flush=True)
