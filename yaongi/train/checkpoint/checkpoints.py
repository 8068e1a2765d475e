"""Checkpoints: written in the background by torch.distributed.checkpoint, and either complete or absent.

`checkpoints/` holds `step-00001200/` folders and `latest`, a file with the name of the newest one. A folder is
written as `….tmp` and renamed when all of it is on disk; then `latest` is updated, and only then are old checkpoints
removed. So the program may be killed at any moment.
"""

import errno
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from yaongi.files import write_atomically
from yaongi.train.checkpoint.staging import PinnedStaging
from yaongi.train.distributed.sharding import local_part
from yaongi.train.distributed.world import World
from yaongi.train.step.guard import first_nonfinite

LATEST = "latest"
META = "run.json"
_NAME = re.compile(r"step-(\d{8,})")
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is intended
_MARGIN = 1.05  # free disk space that a save needs, as a multiple of the checkpoint's bytes


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, world: World, *, keep_last: int = 2, keep_every: int = 0) -> None:
        self.folder, self._world = folder, world
        self._keep_last, self._keep_every = keep_last, keep_every
        self._writing: tuple[int, Future[Any], dict[str, Any]] | None = None
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._stager = PinnedStaging(world.device)

    def prepare(self) -> None:
        """Make the folder, and remove the leftovers of an interrupted save."""
        if self._world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self.folder.glob("*.tmp"):
                shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        self._world.barrier()

    def reserve(self, tensors: dict[str, Any]) -> None:
        """Begin to allocate the host memory for copies of such tensors, so that no save waits for it."""
        self._stager.reserve(tensors)

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, if there is one."""
        pointer = self.folder / LATEST
        if pointer.is_file() and (named := self.folder / pointer.read_text().strip()).is_dir():
            return named
        return max(self._whole().values(), default=None, key=lambda path: path.name)

    def save(self, step: int, tensors: dict[str, Any], meta: dict[str, Any]) -> float:
        """Copy `tensors` and begin to write them; wait first for the previous save, if it is still in progress.

        Args:
            tensors: nested dicts of tensors; they may change as soon as this returns.
            meta: everything else, as values that JSON can hold.

        Returns:
            Seconds that it waited for the previous save.

        Raises:
            OSError: the disk has too little space, or the previous save failed; earlier checkpoints stay as they are.
            ValueError: a tensor is not finite; earlier checkpoints stay as they are.
        """
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - began
        self._check_finite(step, tensors)
        self._check_space(tensors)
        path = self._temporary(step)
        single = self._world.size == 1
        writer = dcp.FileSystemWriter(path)  # one thread: with more, an error in one may go unnoticed
        future = dcp.async_save(
            tensors, storage_writer=writer, process_group=self._group, async_stager=self._stager, no_dist=single
        )
        if not isinstance(future, Future):
            raise RuntimeError(f"checkpoint: the upload must be a future, got {type(future).__name__}")
        self._writing = (step, future, meta)
        return waited

    def poll(self) -> Path | None:
        """Complete the checkpoint in progress if its files are written. Call it every step.

        Returns:
            The checkpoint completed by this call, if any.

        Raises:
            OSError: writing failed; the unfinished folder is removed, and earlier checkpoints stay as they are.
        """
        if self._writing is None or not self._writing[1].done():
            return None
        step, future, meta = self._writing
        self._writing = None
        try:
            future.result()
        except CheckpointException as error:
            raise self._failure(step, _cause(error)) from error
        except (OSError, RuntimeError) as error:
            raise self._failure(step, error) from error
        return self._finish(step, meta) if self._world.is_main else self._path(step)

    def wait(self) -> Path | None:
        """Wait for the save in progress, then `poll`. All processes return only when the checkpoint is complete."""
        if self._writing is None:
            return None
        self._writing[1].exception()
        finished = self.poll()
        self._world.barrier()
        return finished

    def load(self, path: Path, tensors: dict[str, Any]) -> None:
        """Fill `tensors` from a checkpoint, which any number of processes may have written.

        Raises:
            ValueError: the checkpoint is damaged, or of another model.
        """
        try:
            dcp.load(tensors, checkpoint_id=path, process_group=self._group, no_dist=self._world.size == 1)
        except CheckpointException as error:
            cause = _cause(error)
            raise ValueError(f"checkpoint: {path} is damaged or of another model: {_line(cause)}") from error

    def _check_finite(self, step: int, tensors: dict[str, Any]) -> None:
        bad = first_nonfinite((name, local_part(tensor)) for name, tensor in _flat(tensors))
        if self._world.any(bad is not None):
            what = bad or "a tensor of another process"
            raise ValueError(f"checkpoint: {what} is not finite; step {step} is not saved, {self._intact()}")

    def _check_space(self, tensors: dict[str, Any]) -> None:
        wanted = _MARGIN * state_bytes(tensors)
        free = shutil.disk_usage(self.folder).free
        if free < wanted:
            text = f"{self.folder} must have {wanted / 1e9:.3f} GB free, got {free / 1e9:.3f} GB; {self._intact()}"
            raise OSError(errno.ENOSPC, f"checkpoint: {text}")

    def _finish(self, step: int, meta: dict[str, Any]) -> Path:
        temporary, path = self._temporary(step), self._path(step)
        try:
            write_atomically(temporary / META, json.dumps(meta, indent=1).encode())
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
            _flush(self.folder)
            write_atomically(self.folder / LATEST, path.name.encode())
        except OSError as error:
            raise self._failure(step, error) from error
        self._remove_old()
        return path

    def _failure(self, step: int, cause: BaseException) -> OSError:
        if self._world.is_main:
            # errors are ignored, for the disk itself may have failed; `prepare` cleans up too
            shutil.rmtree(self._temporary(step), ignore_errors=True)
        number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
        return OSError(number, f"checkpoint: step {step} could not be saved: {_line(cause)}; {self._intact()}")

    def _intact(self) -> str:
        latest = self.latest()
        return f"the last checkpoint is {latest}" if latest else "there is no earlier checkpoint"

    def _remove_old(self) -> None:
        whole = sorted(self._whole().items())
        for step, path in whole[: -self._keep_last]:
            if not (self._keep_every and step % self._keep_every == 0):
                shutil.rmtree(path)

    def _whole(self) -> dict[int, Path]:
        if not self.folder.is_dir():
            return {}
        named = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return {int(match[1]): path for match, path in named if match}

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _temporary(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.tmp"


def read_meta(path: Path) -> dict[str, Any]:
    """Return the `meta` that `save` was given. Raises ValueError if the file is damaged."""
    try:
        return json.loads((path / META).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint: {path / META} can't be read: {_line(error)}") from error


def _flat(tensors: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in nested dicts, with their keys joined by dots."""
    for key, value in tensors.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def state_bytes(tensors: dict[str, Any]) -> int:
    """Return the bytes of all tensors in nested dicts; a sharded tensor counts with its full size."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in _flat(tensors))


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore the states that `rng_state` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _cause(error: CheckpointException) -> BaseException:
    """Return the exception of the first process that failed."""
    return next(iter(error.failures.values()))[0]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _flush(folder: Path) -> None:
    """Flush a rename within `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
