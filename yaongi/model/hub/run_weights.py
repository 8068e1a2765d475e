"""The weights in a run's checkpoints, read alone, by any process, while the run may go on.

A run's folder holds `checkpoints/`, with a folder `step-00001200/` for each checkpoint and the file `latest`, which
names the newest. A checkpoint is in the format of torch.distributed.checkpoint. Its `run.json` has the configuration,
and its weights are `model.NAME` or, where a weight has a float32 master copy, `optimizer.NAME.master`.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from yaongi.files import find_damage, read_json, sha256_file
from yaongi.model.config import ModelConfig

Tensor = torch.Tensor
CHECKPOINTS, LATEST = "checkpoints", "latest"
META, METADATA = "run.json", ".metadata"  # a checkpoint's files: what JSON can hold, and the list of its tensors
METRICS = "metrics.jsonl"  # the run's record
TOKENIZER = "tokenizer.model"
COMPRESSION = "backbone.compression"
_NAME = re.compile(r"step-(\d{8,})")


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return the folders of all complete checkpoints in `folder`, by step."""
    if not folder.is_dir():
        return {}
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match}


def is_checkpoint(folder: Path) -> bool:
    """Return whether `folder` is a checkpoint."""
    return (folder / META).is_file() and (folder / METADATA).is_file()


def find_weights(folder: Path) -> Path:
    """Return the folder to read a model from: of a run the newest checkpoint, else its model; any other folder itself.

    Raises:
        FileNotFoundError: the run has neither.
    """
    if is_checkpoint(folder):
        return folder
    kept = checkpoints_in(folder / CHECKPOINTS)
    if kept:
        pointer = folder / CHECKPOINTS / LATEST
        name = pointer.read_bytes().decode(errors="replace").strip() if pointer.is_file() else ""
        return next((path for path in kept.values() if path.name == name), kept[max(kept)])
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if (folder / CHECKPOINTS).is_dir():
        raise FileNotFoundError(f"from_pretrained: folder must hold a checkpoint or a model, got the run {folder}")
    return folder


def said_weights(given: Path, found: Path) -> str:
    """Return a line that names the checkpoint that stands for the run `given`; empty where nothing was chosen."""
    return "" if given == found else f"weights: {found}\n"


def run_config(folder: Path) -> dict[str, Any]:
    """Return the training configuration of a checkpoint, or of a run's model folder; empty for another model."""
    if is_checkpoint(folder):
        return dict(_meta(folder)["config"])
    beside = folder.resolve().parent / "config.json"
    fields = read_json(beside) if folder.name == "model" and beside.is_file() else {}
    return fields if "train" in fields else {}


def run_of(folder: Path) -> tuple[Path, int | None]:
    """Return the run of a checkpoint or of a model folder, and the checkpoint's step; it may not be there."""
    here = folder.resolve()
    found = _NAME.fullmatch(here.name) if is_checkpoint(folder) else None
    return (here.parents[1], int(found[1])) if found else (here.parent, None)


def tokenizer_folder(folder: Path) -> Path:
    """Return the folder with the tokenizer of a model or checkpoint: for checkpoints of earlier versions another one.

    Those hold none; the run's model folder may, and the token shards, if they are still there.
    """
    if not is_checkpoint(folder) or (folder / TOKENIZER).is_file():
        return folder
    wanted = _meta(folder).get("tokenizer")
    for place in (folder.resolve().parents[1] / "model", Path(run_config(folder)["run"]["data"]) / "tokenizer"):
        if (place / TOKENIZER).is_file() and sha256_file(place / TOKENIZER) == wanted:
            return place
    return folder


def read_run_config(checkpoint: Path) -> tuple[ModelConfig, torch.dtype]:
    """Return the model's config, without the training's precision, and the dtype of its weights."""
    fields = {key: value for key, value in run_config(checkpoint)["model"].items() if value is not None}
    fields.pop("precision", None)
    config = ModelConfig.from_dict(fields)
    stored = _tensors(checkpoint)
    if f"model.{COMPRESSION}" in stored:
        table = torch.empty(config.vocab_size, dtype=torch.int64)
        _load(checkpoint, {f"model.{COMPRESSION}": table})
        config = dataclasses.replace(config, compressed_vocab_size=int(table.max()) + 1)
    has_master = "optimizer.lm_head.weight.master" in stored
    return config, torch.bfloat16 if has_master else stored["model.lm_head.weight"].properties.dtype


def read_run_weights(checkpoint: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill the targets, which may be on any device and of any floating dtype, from a checkpoint's weights.

    The hashes of all its files are checked first.

    Raises:
        ValueError: a tensor is missing, extra or has a wrong shape, or a file is damaged. No target has changed then.
    """
    damage = find_damage(checkpoint)
    if damage is not None:
        raise ValueError(f"checkpoint: {checkpoint} is damaged: {damage}")
    stored, wanted = _tensors(checkpoint), {}
    for name, target in targets.items():
        key = next((key for key in (f"optimizer.{name}.master", f"model.{name}") if key in stored), None)
        if key is None:
            raise ValueError(f"checkpoint: the tensor {name} must be there, got {checkpoint} without it")
        if stored[key].size != target.shape:
            got = tuple(stored[key].size)
            raise ValueError(f"checkpoint: {name} must be of shape {tuple(target.shape)}, got {got} in {checkpoint}")
        wanted[key] = target.detach()
    names = (key.removeprefix("model.") for key in stored if key.startswith("model."))
    extra = next((name for name in names if name not in targets), None)
    if extra is not None:
        raise ValueError(f"checkpoint: every tensor must be the model's, got the extra {extra} in {checkpoint}")
    _load(checkpoint, wanted)


def _meta(checkpoint: Path) -> dict[str, Any]:
    """Return what `run.json` holds. Raises ValueError if it is damaged or lacks what every checkpoint has."""
    damage = find_damage(checkpoint, names=(META,))
    meta = {} if damage else read_json(checkpoint / META)
    if "config" not in meta:
        raise ValueError(f"checkpoint: {checkpoint} is damaged: {damage or f'{META} has no configuration'}")
    return meta


def _tensors(checkpoint: Path) -> dict[str, Any]:
    """Return the metadata of each tensor of a checkpoint by its name."""
    damage = find_damage(checkpoint, names=(METADATA,))
    if damage is not None:
        raise ValueError(f"checkpoint: {checkpoint} is damaged: {damage}")
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(checkpoint).read_metadata().state_dict_metadata


def _load(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors, by their names in the checkpoint, one at a time."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # it says that this is one process
            dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        gone = "" if checkpoint.is_dir() else " (the run has removed it: try again)"
        raise ValueError(f"checkpoint: {checkpoint} can't be read{gone}: {' '.join(str(cause).split())}") from error
