"""A request to stop, by signal or by the file RUN/stop: finish the step, save, print how to go on.

SIGTERM and SIGUSR1, which machines send, perhaps several times, only ever ask. So does the first Ctrl-C; a second one
ends the program at once, unless it runs under torchrun, which turns a second Ctrl-C into SIGTERM for its processes.
"""

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from yaongi import cli
from yaongi.train.run_folder import STOP
from yaongi.world import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 60.0  # seconds without progress after which a process that was asked to stop ends itself
_ONCE = ("--stop-after", "--from-step", "--skip-batches")  # options with a value that act once


def under_torchrun() -> bool:
    """Return whether torchrun started this process: it starts again whatever ends with another code than 0."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class StopRequest:
    """A context in which signals and the file `RUN/stop` only ask the run to stop."""

    def __init__(self, world: World, folder: Path, progress: Callable[[], object]) -> None:
        """Set nothing yet.

        Args:
            folder: the run's.
            progress: what changes as long as the process gets on.
        """
        self._world, self._file, self._progress = world, folder / STOP, progress
        self._signal: int | None = None
        self._by_file = False
        self._former: dict[int, object] = {}
        self._watch: _Watch | None = None

    def __enter__(self) -> "StopRequest":
        self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        if under_torchrun():
            self._watch = _Watch(self._progress)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._watch is not None:
            self._watch.close()
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # signal.signal returned it

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """Don't call the process stuck within the block, whose progress is not known."""
        if self._watch is not None:
            self._watch.unknown = True
        yield
        if self._watch is not None:
            self._watch.unknown = False

    def requested(self) -> bool:
        """Return whether any process was asked to stop. All must call it at the same point."""
        if self._world.is_main and self._file.exists():
            self._by_file = True
            self._file.unlink(missing_ok=True)
        return self._world.any(self._signal is not None or self._by_file)

    @property
    def exit_code(self) -> int:
        """The exit code of a run that was stopped: 128 + the signal, as shells expect; 0 by file or under torchrun."""
        return 0 if self._signal is None or under_torchrun() else 128 + self._signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = number
            if self._world.is_main:
                again = "" if under_torchrun() else "; Ctrl-C to stop at once"
                print(f"\nstopping after this step{again}", file=sys.stderr, flush=True)
        elif number == signal.SIGINT and not under_torchrun():
            raise KeyboardInterrupt


class _Watch:
    """A thread that ends this process if it gets stuck after a signal, even where no Python code runs any more."""

    def __init__(self, progress: Callable[[], object]) -> None:
        self._progress, self._closed = progress, False
        self.unknown = False  # whether the process is where its progress isn't known
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._former = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="yaongi-stop", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        signal.set_wakeup_fd(self._former)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _run(self) -> None:
        while not self._closed and os.read(self._read, 1)[0] not in SIGNALS:
            pass
        last, since = self._progress(), time.monotonic()
        while not self._closed:
            time.sleep(0.2)
            now = self._progress()
            if now != last or self.unknown:
                last, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                rank = os.environ.get("RANK", "0")
                print(
                    f"error: rank {rank}: no progress for {PATIENCE:.0f} s after a signal", file=sys.stderr, flush=True
                )
                os._exit(1)


def resume_command(
    arguments: Sequence[str], *, module: str = "yaongi.train", from_step: int = 0, skip_batches: int = 0
) -> str:
    """Return the command that resumes this run: the same command line, without the options that act once.

    Args:
        arguments: those of the trainer; under torchrun its own come before them.
        module: of `python -m`.
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
    return shlex.join([*(_torchrun(module) if under_torchrun() else cli.words_for(module)), *kept])


def _torchrun(module: str) -> list[str]:
    """Return torchrun's part of the command line: as it was typed, if the process that started this one shows it."""
    words: list[str] = []
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    names = [Path(word).name for word in words]
    start = next((i for i, name in enumerate(names) if name in ("torchrun", "torch.distributed.run")), None)
    if start is not None and module in words[start:]:
        return ["torchrun", *words[start + 1 : words.index(module, start) + 1]]
    return ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m", module]
