"""SIGTERM and Ctrl-C: finish the step, save, print how to resume. A second signal ends the program at once."""

import shlex
import signal
import sys
from collections.abc import Sequence
from types import FrameType, TracebackType

_ONCE = ("--stop-after", "--from-step", "--skip-batches")  # options with a value that act once
STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which SIGTERM and SIGINT only set a flag; the first signal restores the former handlers."""

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
        """The exit code that shells expect of a program ended by a signal (128 + its number); 0 if none came."""
        return 0 if self.signal is None else 128 + self.signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # signal.signal returned it
        self._former = {}


def resume_command(arguments: Sequence[str], *, from_step: int = 0, skip_batches: int = 0) -> str:
    """Return the command that resumes this run: the same command line, without the options that act once.

    Args:
        from_step: the checkpoint to go on from; 0: the newest.
        skip_batches: batches to leave out.
    """
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, _, value = argument.replace("_", "-").partition("=")
        if option in _ONCE and not value:
            next(rest, None)
        elif option not in ("--fresh", "--no-fresh", *_ONCE):
            kept.append(argument)
    for option, number in (("--from-step", from_step), ("--skip-batches", skip_batches)):
        if number:
            kept += [option, str(number)]
    return shlex.join(["python", "-m", "yaongi.train", *kept])
