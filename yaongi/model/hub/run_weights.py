"""The weights in a run's checkpoints, read alone, by any process, while the run may go on.

A checkpoint is in the format of torch.distributed.checkpoint. Its weights are `model.NAME` or, where a weight has a
float32 master copy, `optimizer.NAME.master`.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from yaongi.files import find_damage
from yaongi.model.config import ModelConfig
from yaongi.model.hub.checkpoint_folders import METADATA, run_config

Tensor = torch.Tensor
COMPRESSION = "backbone.compression"


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
