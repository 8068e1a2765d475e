"""A warning of a process whose micro-batches take longer than the others', again and again."""

import statistics
from collections import Counter
from collections.abc import Sequence

MUCH = 0.05  # share of the median by which a rank is slower
LINES = 20  # of the log in a row


class SlowRanks:
    """For each process, in how many lines of the log in a row it was slower than the median."""

    def __init__(self, places: Sequence[str]) -> None:
        """Begin to count.

        Args:
            places: of all processes, for the warning.
        """
        self._places = places
        self._lines = Counter[int]()  # by rank

    def warning(self, seconds: Sequence[float]) -> str:
        """Return what to say of a process that was slow in the last `LINES` lines; empty if there is none.

        Nothing is said twice of a process that stays slow.

        Args:
            seconds: of each process's micro-batches in a step that the log has a line of; none, or all 0, if they are
                not known.
        """
        found = ""
        if any(seconds):
            median = statistics.median(seconds)
            for rank, taken in enumerate(seconds):
                over = taken / median - 1
                self._lines[rank] = self._lines[rank] + 1 if over > MUCH else 0
                if self._lines[rank] == LINES:
                    slower = f"{100 * over:.1f} % slower than the median"
                    found = f"rank {rank} ({self._places[rank]}) is {slower}: nvidia-smi -q -d PERFORMANCE"
        return found
