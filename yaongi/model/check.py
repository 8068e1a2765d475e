"""Checks of what a model is given: token ids, targets, and the map of Engram's ids."""

import torch
from numpy.typing import ArrayLike

from yaongi.model.config import ModelConfig

Tensor = torch.Tensor


def check_tokens(input_ids: Tensor, document_ids: Tensor | None, vocab_size: int) -> None:
    """Check the shape and dtype of the ids, and on the CPU that they are in the vocabulary."""
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"model: input_ids must be int64 or int32, got {str(input_ids.dtype).removeprefix('torch.')}")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"model: input_ids must be (B, L) with B, L >= 1, got {tuple(input_ids.shape)}")
    if document_ids is not None:
        if document_ids.dtype != torch.int32:
            got = str(document_ids.dtype).removeprefix("torch.")
            raise TypeError(f"model: document_ids must be int32, got {got}")
        if document_ids.shape != input_ids.shape:
            wanted = tuple(input_ids.shape)
            raise ValueError(f"model: document_ids must be {wanted} like input_ids, got {tuple(document_ids.shape)}")
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"model: token ids must be 0 to {vocab_size - 1}, got {bad}")


def check_targets(targets: Tensor, input_ids: Tensor, vocab_size: int) -> None:
    """Check the shape and dtype of targets, and on the CPU that none is above the vocabulary."""
    if targets.dtype != torch.int64:
        raise TypeError(f"model: targets must be int64, got {str(targets.dtype).removeprefix('torch.')}")
    if targets.shape != input_ids.shape:
        raise ValueError(f"model: targets must be {tuple(input_ids.shape)} like input_ids, got {tuple(targets.shape)}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and int(targets.max()) >= vocab_size:
        raise ValueError(f"model: targets must be below {vocab_size}, got {int(targets.max())}")


def compression_table(compression: ArrayLike, config: ModelConfig) -> Tensor:
    """Return the compression map as a tensor on the CPU, checked against the config."""
    table = torch.as_tensor(compression, dtype=torch.int64, device="cpu")
    if table.shape != (config.vocab_size,) or int(table.min()) < 0:
        wanted = f"({config.vocab_size},) whole numbers from 0"
        raise ValueError(f"Yaongi: compression must be {wanted}, got {tuple(table.shape)} from {int(table.min())}")
    size = int(table.max()) + 1
    if config.compressed_vocab_size not in (None, size):
        raise ValueError(f"Yaongi: compression must have {config.compressed_vocab_size} ids, got {size}")
    return table
