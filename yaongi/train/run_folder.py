"""The folder of a run: its files and its lock."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from yaongi.files import write_atomically
from yaongi.model.hub.run_weights import CHECKPOINTS

MODEL = "model"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
REPORT = "report.html"
TENSORBOARD = "tensorboard"
WANDB, WANDB_ID = "wandb", "wandb_id.json"
LOCK = ".lock"
STOP = "stop"  # made by anyone, it asks the run to stop
RUN_ENTRIES = (CHECKPOINTS, MODEL, CONFIG, METRICS, REPORT, TENSORBOARD, WANDB, WANDB_ID)


class Lock:
    """A file lock held by the process that trains in a folder; it is released however that process ends."""

    def __init__(self, folder: Path) -> None:
        """Take the lock. Raises ValueError if another process holds it."""
        self._file: IO[str] = (folder / LOCK).open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"train: another process trains in {folder}") from error

    def release(self) -> None:
        """Release the lock."""
        self._file.close()


def remove_run(folder: Path) -> None:
    """Remove the files of a run from `folder`, and nothing else. Links to folders and mount points stay, empty."""
    for name in RUN_ENTRIES:
        _remove(folder / name)


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
    elif path.is_symlink() or path.is_mount():
        for inner in path.iterdir():
            _remove(inner)
    else:
        shutil.rmtree(path)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the resolved configuration to `config.json`."""
    write_atomically(folder / CONFIG, json.dumps(config, indent=1).encode())


def check_writable(folder: Path) -> None:
    """Raise OSError if `folder` can't be written to or, where it is missing, can't be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"train: --out must be a folder, got {folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"train: {folder} can't be written")
