"""Reading and writing model folders: Hugging Face's `nemotron_h` layout, or our own `yaongi` for models with Engram."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from yaongi.files import read_json, write_json
from yaongi.model.config import ModelConfig
from yaongi.model.count import ParameterCounts
from yaongi.model.hub.card import CARD, model_card
from yaongi.model.hub.checkpoint_folders import is_checkpoint
from yaongi.model.hub.config_json import (
    CONFIG,
    GENERATION,
    REMOTE_CODE,
    control_tokens,
    nemotron_h_config,
    read_config_json,
    yaongi_config,
)
from yaongi.model.hub.run_weights import read_run_config, read_run_weights
from yaongi.model.hub.weights import SHARD_BYTES, read_shards, staged, write_shards

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
ENGRAM_TENSORS = (".engram.", "backbone.compression")  # substrings of the tensor names that nemotron_h can't hold


def read_config(folder: Path) -> tuple[ModelConfig, torch.dtype]:
    """Read the config of a model folder, or of a run's checkpoint, and the dtype of its weights.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: the config has something that this model does not support.
    """
    if is_checkpoint(folder):
        return read_run_config(folder)
    config, name = read_config_json(folder)
    dtype = getattr(torch, name, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"config.json: dtype must be a floating one, got {name!r}")
    return config, dtype


def read_weights(folder: Path, targets: Mapping[str, torch.Tensor]) -> None:
    """Fill the targets from a model folder, or from a run's checkpoint; errors as in `read_shards`."""
    (read_run_weights if is_checkpoint(folder) else read_shards)(folder, targets)


def save(
    model: nn.Module, config: ModelConfig, counts: ParameterCounts, folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the complete model: as `nemotron_h` if it has no Engram, else as `yaongi`."""
    with staged(folder) as temporary:
        if config.engram:
            _write_yaongi(model, config, counts, temporary, shard_bytes)
        else:
            _write_nemotron_h(model, config, counts, temporary, shard_bytes, lost=None)


def export_nemotron_h(
    model: nn.Module,
    config: ModelConfig,
    counts: ParameterCounts,
    folder: Path,
    *,
    drop_engram: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model as `nemotron_h`, which transformers reads.

    Raises:
        ValueError: the model has an Engram, which this layout can't hold, and `drop_engram` is not set.
    """
    lost = lost_without_engram(config, counts)
    if lost and not drop_engram:
        raise ValueError(
            f"export: model must be without Engram for nemotron_h, got {lost}: --drop-engram leaves that out, "
            "save_pretrained keeps everything"
        )
    with staged(folder) as temporary:
        _write_nemotron_h(model, config, counts, temporary, shard_bytes, lost=lost)


def lost_without_engram(config: ModelConfig, counts: ParameterCounts) -> str | None:
    """Describe what nemotron_h can't hold of this model; None if nothing."""
    if not config.engram:
        return None
    layers = " and ".join(str(engram.layer) for engram in config.engram)
    return f"the Engram of layer {layers} with {counts.total - counts.without_engram().total:,} parameters"


def _write_nemotron_h(
    model: nn.Module, config: ModelConfig, counts: ParameterCounts, folder: Path, shard_bytes: int, *, lost: str | None
) -> None:
    config, counts, dtype = config.without_engram(), counts.without_engram(), _dtype_name(model)
    kept = {n: t for n, t in _state(model).items() if not any(mark in n for mark in ENGRAM_TENSORS)}
    write_shards(kept, folder, shard_bytes)
    write_json(folder / CONFIG, nemotron_h_config(config, dtype))
    _write_rest(config, folder, model_card(config, counts, dtype, hub=True, lost=lost))


def _write_yaongi(
    model: nn.Module, config: ModelConfig, counts: ParameterCounts, folder: Path, shard_bytes: int
) -> None:
    dtype = _dtype_name(model)
    write_shards(_state(model), folder, shard_bytes)
    write_json(folder / CONFIG, yaongi_config(config, dtype))
    shutil.copyfile(Path(__file__).with_name(f"{REMOTE_CODE}.py"), folder / f"{REMOTE_CODE}.py")
    _write_rest(config, folder, model_card(config, counts, dtype, hub=False))


def _write_rest(config: ModelConfig, folder: Path, card: str) -> None:
    """Write the generation config and the model card."""
    write_json(folder / GENERATION, control_tokens(config))
    (folder / CARD).write_text(card, encoding="utf-8")


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors to store; projections that training keeps in float32, for FP8, in the dtype of the others."""
    dtype, state = model.get_parameter("lm_head.weight").dtype, model.state_dict()
    return {n: t.to(dtype) if n.endswith("_proj.weight") else t for n, t in state.items()}


def _dtype_name(model: nn.Module) -> str:
    return str(model.get_parameter("lm_head.weight").dtype).removeprefix("torch.")


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy the tokenizer's files; one that doesn't say on which side it pads, as older ones don't, pads on the left."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    config = out / "tokenizer_config.json"
    if config.is_file():
        write_json(config, {"padding_side": "left", **read_json(config)})
