"""Checkpoints: written in the background by torch.distributed.checkpoint, and either complete or absent.

`checkpoints/` holds `step-00001200/` folders and `latest`, a file with the name of the newest one. A folder is
written as `….tmp` and renamed when all of it is on disk; then `latest` is updated, and only then are old checkpoints
removed. So the program may be killed at any moment.
"""

import contextlib
import errno
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from yaongi.files import find_damage, write_atomically
from yaongi.model.hub.checkpoint_folders import LATEST, META, checkpoints_in
from yaongi.train.checkpoint.hashes import HashingWriter
from yaongi.train.checkpoint.room import MARGIN, check_room, kept_of, most_checkpoints
from yaongi.train.checkpoint.staging import PinnedStaging
from yaongi.train.distributed.sharding import local_part
from yaongi.train.step.guard import first_nonfinite
from yaongi.world import HOST, World

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is intended
Problem = tuple[int, str]  # errno and one line


class DamagedError(ValueError):
    """The checkpoint to go on from can't be read; `whole` is the step of the newest one that can, if there is one."""

    def __init__(self, message: str, whole: int | None) -> None:
        super().__init__(message)
        self.whole = whole


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, world: World, *, keep_last: int = 2, keep_every: int = 0) -> None:
        self.folder, self._world = folder, world
        self._keep_last, self._keep_every = keep_last, keep_every
        self._writing: tuple[int, Future[Any]] | None = None
        several = world.size > 1  # a group of its own: the background uses it while training uses the others
        self._group = dist.new_group(backend="gloo", timeout=HOST) if several else None
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
        """Return the checkpoint that `latest` names, without that file the newest one; None if there is none.

        Raises:
            DamagedError: the file `latest` is empty, or names no checkpoint.
        """
        pointer, kept = self.folder / LATEST, self.kept()
        if not pointer.is_file() or not kept:
            return kept[max(kept)] if kept else None
        name = pointer.read_bytes().decode(errors="replace").strip()
        found = next((path for path in kept.values() if path.name == name), None)
        if found is None:
            raise self.damaged(f"{pointer} must name a checkpoint, got {name!r}", max(kept) + 1)
        return found

    def at(self, step: int) -> Path:
        """Return the checkpoint of `step`. Raises ValueError if there is none, and names those that there are."""
        kept = self.kept()
        if step not in kept:
            steps = ", ".join(map(str, sorted(kept))) or "none"
            raise ValueError(
                f"checkpoint: --from-step must be one of the steps kept in {self.folder} ({steps}), got {step}"
            )
        return kept[step]

    def point_to(self, path: Path) -> None:
        """Make `path` the checkpoint to go on from; the next save removes those of later steps."""
        if self._world.is_main:
            write_atomically(self.folder / LATEST, path.name.encode())
        self._world.barrier()

    def damaged(self, what: str, step: int) -> DamagedError:
        """Return the error to raise for `what`, after a search for the newest undamaged checkpoint before `step`."""
        older = sorted(((s, path) for s, path in self.kept().items() if s < step), reverse=True)
        whole = next((s for s, path in older if find_damage(path) is None), None)
        return DamagedError(f"checkpoint: {what}", whole)

    def save(
        self, step: int, tensors: dict[str, Any], meta: dict[str, Any], files: Mapping[str, bytes] | None = None
    ) -> float:
        """Copy `tensors` and begin to write them; wait first for the previous save, if it is still in progress.

        Args:
            tensors: nested dicts of tensors; they may change as soon as this returns.
            meta: everything else, as values that JSON can hold.
            files: content of further files, by name.

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
        single = self._world.size == 1
        texts = {META: json.dumps(meta, indent=1).encode(), **(files or {})}
        writer = HashingWriter(self._temporary(step), texts)
        future = dcp.async_save(
            tensors, storage_writer=writer, process_group=self._group, async_stager=self._stager, no_dist=single
        )
        if not isinstance(future, Future):
            raise RuntimeError(f"checkpoint: the upload must be a future, got {type(future).__name__}")
        self._writing = (step, future)
        return waited

    def poll(self) -> Path | None:
        """Complete the checkpoint in progress if all processes have written their files. All call it every step.

        Returns:
            The checkpoint completed by this call, if any.

        Raises:
            OSError: writing failed; the unfinished folder is removed, and earlier checkpoints stay as they are.
        """
        if self._writing is None or not self._world.all(self._writing[1].done()):
            return None
        step, future = self._writing
        self._writing = None
        self._require_saved(step, _problem(future.exception()))
        problem = None
        if self._world.is_main:
            try:
                self._finish(step)
            except OSError as error:
                problem = _problem(error)
        self._require_saved(step, problem)
        if self._world.is_main:
            self._remove_old(step)
        return self._path(step)

    def _require_saved(self, step: int, problem: Problem | None) -> None:
        """Raise OSError on all processes if any has a problem."""
        found = next(filter(None, self._world.gather(problem)), None)
        if found is not None:
            if self._world.is_main:
                # errors are ignored, for the disk itself may have failed; `prepare` cleans up too
                shutil.rmtree(self._temporary(step), ignore_errors=True)
            self._world.barrier()
            number, text = found
            raise OSError(number, f"checkpoint: step {step} could not be saved: {text}; {self._intact()}")

    def wait(self) -> Path | None:
        """Wait for the save in progress, then `poll`. All processes return only when the checkpoint is complete."""
        if self._writing is None:
            return None
        self._writing[1].exception()
        return self.poll()

    def bytes_being_written(self) -> int:
        """Return the size on disk of the checkpoints that are not complete yet."""
        with contextlib.suppress(OSError):  # a file may go away meanwhile
            return sum(path.stat().st_size for path in self.folder.glob("*.tmp/*"))
        return 0

    def load(self, path: Path, tensors: dict[str, Any]) -> None:
        """Check the hash of every file of a checkpoint, then fill `tensors` from it.

        Any number of processes may have written it; each process checks a share of its files.

        Raises:
            DamagedError: a file is missing, or has changed since it was saved.
            ValueError: the checkpoint is of another model.
        """
        rank, size = self._world.rank, self._world.size
        damage = find_damage(path, slice(rank, None, size))
        if self._world.any(damage is not None):
            raise self.damaged(f"{path} is damaged: {damage or 'another process found it'}", step_of(path))
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

    def check_room(self, tensors: dict[str, Any], saves: Iterable[int], model: Path, model_bytes: int) -> None:
        """Check that the disk has room for all that will be kept, and for the model at the end.

        Args:
            tensors: of a checkpoint.
            saves: the steps of the saves to come, ascending.
            model: the folder of the model.

        Raises:
            OSError: it has not.
        """
        there, size = self.kept(), self._bytes_of(tensors)
        counts = most_checkpoints(there, saves, self._keep_last, self._keep_every)
        check_room(self.folder, model, (len(there), *counts), (size, model_bytes))

    def _bytes_of(self, tensors: dict[str, Any]) -> int:
        sizes: dict[str, int] = {}  # a tensor that several processes hold is written once
        for held in self._world.gather({name: _size(tensor) for name, tensor in _flat(tensors)}):
            sizes |= held
        return sum(sizes.values())

    def _check_space(self, tensors: dict[str, Any]) -> None:
        wanted = MARGIN * self._bytes_of(tensors)
        free = shutil.disk_usage(self.folder).free
        if free < wanted:
            text = f"{self.folder} must have {wanted / 1e9:.3f} GB free, got {free / 1e9:.3f} GB; {self._intact()}"
            raise OSError(errno.ENOSPC, f"checkpoint: {text}")

    def _finish(self, step: int) -> None:
        """Make the files that all processes have written the newest checkpoint."""
        temporary, path = self._temporary(step), self._path(step)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        _flush(self.folder)
        write_atomically(self.folder / LATEST, path.name.encode())

    def _intact(self) -> str:
        kept = self.kept()
        return f"the last checkpoint is {kept[max(kept)]}" if kept else "there is no earlier checkpoint"

    def _remove_old(self, newest: int) -> None:
        """Remove what need not be kept, and what a run that went on from an older step left of its later steps."""
        kept = self.kept()
        stay = kept_of((step for step in kept if step <= newest), self._keep_last, self._keep_every)
        for step, path in kept.items():
            if step not in stay:
                shutil.rmtree(path)

    def kept(self) -> dict[int, Path]:
        """Return the folders of all complete checkpoints, by step."""
        return checkpoints_in(self.folder)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _temporary(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.tmp"


def read_meta(path: Path) -> dict[str, Any]:
    """Return the `meta` that `save` was given. Raises ValueError if the file is damaged."""
    if damage := find_damage(path, names=(META,)):
        raise ValueError(f"checkpoint: {path} is damaged: {damage}")
    try:
        return json.loads((path / META).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint: {path / META} can't be read: {_line(error)}") from error


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def _flat(tensors: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in nested dicts, with their keys joined by dots."""
    for key, value in tensors.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


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


def _problem(error: BaseException | None) -> Problem | None:
    """Return why a checkpoint could not be written. Raises what is no failure of the machine."""
    cause = _cause(error) if isinstance(error, CheckpointException) else error
    if cause is None:
        return None
    if not isinstance(cause, (OSError, RuntimeError)) and cause is error:
        raise cause
    number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
    return number, _line(cause)


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
