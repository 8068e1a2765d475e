"""SIGTERM and Ctrl-C: finish the step, save, say how to resume. A second one ends the program at once."""

import shlex
import signal
import sys
from collections.abc import Sequence
from types import FrameType, TracebackType

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which the two signals only raise a flag; the first one restores the usual handlers."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._former: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._former = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal ended; 0 if none came."""
        return 0 if self.signal is None else 128 + self.signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned
        self._former = {}


def resume_command(arguments: Sequence[str]) -> str:
    """The command line that goes on with this run: the same one without `--fresh` and `--stop-after`."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, _, value = argument.replace("_", "-").partition("=")
        if option == "--stop-after" and not value:
            next(rest, None)
        elif option not in ("--fresh", "--stop-after"):
            kept.append(argument)
    return shlex.join(["python", "-m", "yaongi.train", *kept])
