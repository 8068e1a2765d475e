"""The folder of a run: its files and its lock."""

import os
import shutil
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from yaongi.files import write_json
from yaongi.model.hub.checkpoint_folders import CHECKPOINTS, METRICS

MODEL = "model"
CONFIG = "config.json"
REPORT = "report.html"
TENSORBOARD = "tensorboard"
WANDB, WANDB_ID = "wandb", "wandb_id.json"
LOCK = ".lock"
NCCL = "nccl"  # what torch's flight recorder writes where processes hang
STOP = "stop"  # made by anyone, it asks the run to stop
RUN_ENTRIES = (CHECKPOINTS, MODEL, CONFIG, METRICS, REPORT, TENSORBOARD, WANDB, WANDB_ID, NCCL)


def lock_run(folder: Path) -> BaseFileLock:
    """Take the lock of a run's folder, which is released however the process ends, and return it.

    Raises:
        ValueError: another process holds it.
    """
    held = FileLock(folder / LOCK)
    try:
        held.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(f"train: another process trains in {folder}") from error
    return held


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
    write_json(folder / CONFIG, config)


def check_writable(folder: Path) -> None:
    """Raise OSError if `folder` can't be written to or, where it is missing, can't be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"train: --out must be a folder, got {folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"train: {folder} can't be written")
