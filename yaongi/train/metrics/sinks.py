"""Where metrics go besides `metrics.jsonl`: wandb and TensorBoard, each only if it is installed and wanted.

Neither can hold a run up: what goes wrong there is one warning, and the run goes on without that sink.
"""

import contextlib
import fcntl
import importlib.util
import json
import netrc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from yaongi.train.config import Running
from yaongi.train.run_folder import REPORT, TENSORBOARD

CLOSE_SECONDS = 50.0  # that wandb gets to send the rest at the end
WANDB_PROGRAM = [sys.executable, "-m", "yaongi.train.metrics.wandb_process"]
_PIPE_BYTES = 1 << 20  # of lines that wait while wandb is busy: thousands of steps


Loads = list[list[int]]  # per layer the tokens that each expert got


class Sink(Protocol):
    """A destination for what a run records. It prints its own trouble, and raises nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name after `step` steps."""

    def log_loads(self, step: int, loads: Loads) -> None:
        """Record how evenly the experts are loaded."""

    def log_samples(self, step: int, texts: Mapping[str, str]) -> None:
        """Record texts drawn from the model, by their prompts' names."""

    def close(self) -> None:
        """Flush and end."""


class TensorBoard:
    """A TensorBoard writer of event files in `OUT/tensorboard`."""

    def __init__(self, folder: Path, first_step: int, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder / TENSORBOARD, warn
        self._writer: Any = None
        self._guarded(lambda: self._open(first_step))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` after `step` steps."""
        self._written(lambda writer: [writer.add_scalar(name, value, step) for name, value in values.items()])

    def log_loads(self, step: int, loads: Loads) -> None:
        """Record a histogram of the experts' loads, 1 for an even share."""
        self._written(lambda writer: writer.add_histogram("expert_load", np.array(even_shares(loads)), step))

    def log_samples(self, step: int, texts: Mapping[str, str]) -> None:
        """Record the texts."""
        self._written(lambda writer: [writer.add_text(f"sample/{name}", text, step) for name, text in texts.items()])

    def close(self) -> None:
        """Flush and end."""
        self._written(lambda writer: writer.close())

    def _open(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=first_step + 1)

    def _written(self, action: Callable[[Any], Any]) -> None:
        """Do something with the writer, as long as there is one."""
        if self._writer is not None:
            self._guarded(lambda: action(self._writer))

    def _guarded(self, action: Callable[[], Any]) -> None:
        """Do it; after an error warn, and do nothing from then on."""
        try:
            action()
        except Exception as error:  # of the disk, or of TensorBoard's own thread
            self._writer = None
            self._warn(f"tensorboard: {_line(error)}; the run goes on without it")


class Wandb:
    """The wandb run of an output folder, continued after a resume; offline without a key or a connection.

    It lives in a process of its own (`wandb_process.py`), which gets lines through a pipe that never blocks.
    """

    def __init__(
        self, start: dict[str, Any], say: Callable[[str], None], warn: Callable[[str], None], program: list[str]
    ) -> None:
        """Start the process.

        Args:
            start: what it needs to begin the run (`wandb_process.py`).
            program: command of the process.
        """
        self._say, self._warn = say, warn
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output, self._rest = self._process.stdin.fileno(), self._process.stdout.fileno(), b""
        fcntl.fcntl(self._input, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        for end in (self._input, self._output):
            os.set_blocking(end, False)
        self._open, self._failed = True, False
        self._send(start)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` after `step` steps."""
        self._record({"step": step, "values": dict(values)})

    def log_loads(self, step: int, loads: Loads) -> None:
        """Record a histogram of the experts' loads, 1 for an even share."""
        self._record({"step": step, "loads": even_shares(loads)})

    def log_samples(self, step: int, texts: Mapping[str, str]) -> None:
        """Record the texts as rows of a table."""
        self._record({"step": step, "samples": dict(texts)})

    def close(self) -> None:
        """Let it send the rest for at most `CLOSE_SECONDS`, then end it."""
        self._end_input()
        try:
            code = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            code = 0
            self._fail(f"wandb: it did not end within {CLOSE_SECONDS:g} s; metrics.jsonl has everything")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # wandb's own processes too
        self._pass_on()
        self._process.wait()
        if code:
            self._fail(f"wandb: it ended with status {code}; metrics.jsonl has everything")

    def _record(self, record: dict[str, Any]) -> None:
        self._pass_on()
        if self._open:
            self._send(record)

    def _send(self, record: dict[str, Any]) -> None:
        """Put a line into the pipe; where there is no room for all of it, or no reader, warn and send no more."""
        line = json.dumps(record).encode() + b"\n"
        try:
            if os.write(self._input, line) == len(line):
                return
            reason = "it takes no more lines"
        except BlockingIOError:
            reason = "it takes no more lines"
        except OSError as error:
            reason = _line(error)
        self._pass_on()
        self._fail(f"wandb: {reason}; the run goes on without it")
        self._end_input()

    def _fail(self, text: str) -> None:
        """Warn, once."""
        if not self._failed:
            self._warn(text)
        self._failed = True

    def _end_input(self) -> None:
        if self._open:
            self._open = False
            self._process.stdin.close()  # type: ignore[union-attr]  # it is a pipe

    def _pass_on(self) -> None:
        """Print what the process has said since the last time; a line that begins with `!` is why it ends."""
        try:
            content = self._rest + (os.read(self._output, 1 << 16) or b"")
        except BlockingIOError:
            return
        *lines, self._rest = content.split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            self._fail(text[1:]) if text.startswith("!") else self._say(text)


def open_sinks(
    run: Running, config: dict[str, Any], first_step: int, say: Callable[[str], None], warn: Callable[[str], None]
) -> list[Sink]:
    """Open the sinks that the run wants; one that isn't installed is left out, and a message says so.

    Args:
        config: what wandb shows as the run's configuration.
        first_step: steps done before this start.
    """
    sinks: list[Sink] = []
    mode: str = run.wandb
    if mode == "auto":
        mode = "online" if has_key() else "off"
        if mode == "off":
            say("wandb: off, for there is no WANDB_API_KEY (--wandb offline keeps a log that `wandb sync` sends later)")
    for name, wanted in (("wandb", mode != "off"), ("tensorboard", run.tensorboard)):
        if not wanted:
            continue
        if importlib.util.find_spec(name) is None:
            say(f"{name} is not installed: metrics go to metrics.jsonl without it")
        elif name == "wandb":
            sinks.append(Wandb(_wandb_start(run, mode, config), say, warn, WANDB_PROGRAM))
        else:
            sinks.append(TensorBoard(run.out, first_step, warn))
    return sinks


def has_key() -> bool:
    """Return whether there is a key for wandb's server: in WANDB_API_KEY, or where `wandb login` puts it."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return bool(os.environ.get("WANDB_API_KEY")) or netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def even_shares(loads: Loads) -> list[float]:
    """Return each expert's tokens over the mean of its layer, layer after layer."""
    return [round(count * len(layer) / max(1, sum(layer)), 3) for layer in loads for count in layer]


def _wandb_start(run: Running, mode: str, config: dict[str, Any]) -> dict[str, Any]:
    folder = run.out.resolve()
    return {
        "folder": str(folder),
        "report": str(folder / REPORT),
        "mode": mode,
        "project": run.project,
        "name": run.wandb_name or folder.name,
        "group": run.wandb_group or None,
        "tags": list(run.wandb_tags),
        "config": config,
    }


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
