"""The folder of a run: what lies in it, whose run it is, and that only one process group trains in it."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from yaongi.data.files import write_atomically
from yaongi.train.checkpoint import Checkpoints, read_meta
from yaongi.train.config import differences
from yaongi.train.names import CONFIG, LOCK, MADE_BY_A_RUN


class Lock:
    """Held by the process that trains in a folder, and given back when it ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """ValueError if another process holds it."""
        self._file: IO[str] = (folder / LOCK).open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"train: another process trains in {folder}") from error

    def release(self) -> None:
        """Give it back."""
        self._file.close()


def start_anew(folder: Path) -> None:
    """Remove what a run has left in ``folder``, and nothing else."""
    for name in MADE_BY_A_RUN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def find_run(folder: Path, checkpoints: Checkpoints, config: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of the run in ``folder`` and its ``meta``; None if there is none yet.

    Raises:
        ValueError: the run there has another configuration; the message shows what differs.
    """
    latest = checkpoints.latest()
    if latest is None:
        return None
    meta = read_meta(latest)
    differing = differences(meta["config"], config)
    if differing:
        raise ValueError(
            f"train: {folder} holds a run of another configuration; --fresh starts anew, --out goes elsewhere: "
            + "; ".join(differing)
        )
    return latest, meta


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Record the resolved configuration."""
    write_atomically(folder / CONFIG, json.dumps(config, indent=1).encode())


def check_writable(folder: Path) -> None:
    """Make ``folder``. OSError if it can't be made or written."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"train: {folder} can't be written")
