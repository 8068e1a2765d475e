"""A model's tensors in safetensors files, under the hub's names: one tensor per expert; the model has one for all.

Reading first checks every name and shape in the files' headers, then copies shard by shard.
"""

import errno
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from yaongi.files import read_json, write_json
from yaongi.model.hub.config_json import REMOTE_CODE

Tensor = torch.Tensor

INDEX_FILE = "model.safetensors.index.json"

SINGLE_FILE = "model.safetensors"

SAVING = ".saving-"  # prefix of a temporary folder

SHARD_BYTES = 5_000_000_000

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

_EXPERT = re.compile(r"(.*\.mixer\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")

_ALL_EXPERTS = re.compile(r"(.*\.mixer\.experts)\.(up_proj|down_proj)")

_ELSEWHERE = "mtp."  # prefix of a head for speculative decoding, which is ignored, as transformers does


@dataclass(frozen=True)
class Place:
    """The destination of a stored tensor: a tensor of the model, or one expert's part of it."""

    name: str
    expert: int | None = None

    @classmethod
    def of(cls, stored: str) -> "Place":
        """Return the place of a stored name; transformers' prefix `model.` is accepted too."""
        if stored.startswith("model."):
            stored = "backbone." + stored.removeprefix("model.")
        found = _EXPERT.fullmatch(stored)
        return cls(f"{found[1]}.{found[3]}", int(found[2])) if found else cls(stored)

    def __str__(self) -> str:
        return _expert_name(self.name, self.expert) if self.expert is not None else self.name


def _expert_name(name: str, expert: int) -> str:
    folder, _, leaf = name.rpartition(".")
    return f"{folder}.{expert}.{leaf}.weight"


def hub_tensors(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors to store of a state dict, in order; experts are views."""
    for name, tensor in state.items():
        if _ALL_EXPERTS.fullmatch(name):
            yield from ((_expert_name(name, expert), part) for expert, part in enumerate(tensor.unbind()))
        else:
            yield name, tensor


def write_shards(state: Mapping[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model-0000i-of-0000n.safetensors`, each of at most `shard_bytes` bytes or one tensor, and the index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in hub_tensors(state):
        if tensor.is_meta:
            raise ValueError(f"save_pretrained: {name} must have values, got a tensor on the meta device")
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        try:
            save_file({n: t.cpu().contiguous() for n, t in shard.items()}, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(errno.EIO, f"{folder / file} can't be written: {' '.join(str(error).split())}") from error
        (folder / file).chmod(0o644)  # safetensors makes it readable for the owner only
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def read_shards(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill the targets, which may be on any device and of any floating dtype, from the folder's weights.

    Of a `DTensor` each process fills the rows that are there.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: a tensor is missing, extra or has a wrong shape, or a file is damaged. No target has changed then,
            unless a file changes while it is read.
    """
    files = _weight_files(folder)
    stored: dict[Place, Path] = {}
    for file in files:
        with _opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                if not name.startswith(_ELSEWHERE):
                    place = Place.of(name)
                    _check_shape(place, tuple(shard.get_slice(name).get_shape()), targets, file)
                    stored[place] = file
    _check_complete(stored, targets, folder)
    for file in files:
        with _opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118
                if not name.startswith(_ELSEWHERE):
                    place = Place.of(name)
                    _copy(shard.get_tensor(name), targets[place.name], place.expert)


def _copy(stored: Tensor, target: Tensor, expert: int | None) -> None:
    """Copy a stored tensor into a target, or into an expert's part of it; of a `DTensor` into the rows here."""
    if not isinstance(target, DTensor):
        (target if expert is None else target[expert]).copy_(stored)
        return
    first, here = target.__create_chunk_list__()[0].offsets[0], target.to_local()
    if expert is None:
        here.copy_(stored[first : first + len(here)])
    elif first <= expert < first + len(here):
        here[expert - first].copy_(stored)


def read_tensor(folder: Path, name: str) -> Tensor:
    """Read one tensor of a folder. Raises ValueError if it isn't there."""
    for file in _weight_files(folder):
        with _opened(file) as shard:
            if name in shard.keys():  # noqa: SIM118 (not a dict)
                return shard.get_tensor(name)
    raise ValueError(f"{folder.name}: the tensor {name} must be there, got none")


def _check_shape(place: Place, shape: tuple[int, ...], targets: Mapping[str, Tensor], file: Path) -> None:
    target = targets.get(place.name)
    if target is None or (place.expert is not None and place.expert >= target.shape[0]):
        raise ValueError(f"{file.name}: every tensor must be the model's, got the extra {place}")
    wanted = tuple(target.shape if place.expert is None else target.shape[1:])
    if shape != wanted:
        raise ValueError(f"{file.name}: {place} must be of shape {wanted}, got {shape}")


def _check_complete(stored: Mapping[Place, Path], targets: Mapping[str, Tensor], folder: Path) -> None:
    """Check that every target is stored, as one tensor or by experts."""
    for name, target in targets.items():
        wanted = [Place(name)]
        if Place(name) not in stored and _ALL_EXPERTS.fullmatch(name):
            wanted = [Place(name, expert) for expert in range(target.shape[0])]
        missing = next((place for place in wanted if place not in stored), None)
        if missing:
            raise ValueError(f"{folder.name}: the tensor {missing} must be there, got {len(stored)} tensors without it")


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights: the single one if it is there, as transformers does, else the index's."""
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not index.is_file():
        raise FileNotFoundError(f"from_pretrained: {INDEX_FILE} or {SINGLE_FILE} must be in {folder}, got neither")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index.name}: weight_map must be a table, got {weight_map!r}")
    files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
    missing = next((file for file in files if not file.is_file()), None)
    if missing:
        raise FileNotFoundError(
            f"from_pretrained: {missing.name}, which the index names, must be in {folder}, got none"
        )
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file; its own errors become ValueError with the file's name."""
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise ValueError(
            f"{file.name}: must be a whole safetensors file, got {' '.join(str(error).split())}"
        ) from error


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a temporary folder whose files move into `folder` at the end; after an error `folder` stays as it was.

    What an earlier save wrote and this one did not is removed: the shards that its index lists or that have a shard's
    name, and the remote code. Every other file stays.

    Raises:
        FileExistsError: another tool's single weight file is there, which readers would take instead of the shards.
    """
    if (folder / SINGLE_FILE).exists():
        why = "which would be read instead of the shards"
        raise FileExistsError(f"save_pretrained: folder must have no {SINGLE_FILE}, {why}, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=SAVING, dir=folder) as temporary:
        yield Path(temporary)
        before = {*_shards_in(folder), f"{REMOTE_CODE}.py"}
        files = [path for path in sorted(Path(temporary).iterdir()) if not path.name.startswith(SAVING)]
        for file in files:
            os.replace(file, folder / file.name)
    for name in before - {file.name for file in files}:
        (folder / name).unlink(missing_ok=True)


def _shards_in(folder: Path) -> set[str]:
    """Return the names of the shards of earlier saves."""
    listed: set[str] = set()
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        listed = {Path(str(name)).name for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    return listed | {path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name)}
