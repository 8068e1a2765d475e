"""Padded rows for a model that reads documents: the text of each row moves to its right end, the padding before it."""

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Alignment:
    """Where the tokens of padded rows (B, L) go, so that every row ends with its text."""

    order: Tensor  # (B, L) int64, the place that each aligned token comes from
    back: Tensor  # (B, L) int64, the aligned place of each token; of padding, that of the text before it
    document_ids: Tensor  # (B, L) int32, aligned: 0 for padding, 1 for text


def align(mask: Tensor) -> Alignment | None:
    """Return how to align rows by their attention mask; None if nothing is padding.

    Args:
        mask: (B, L), not 0 for text; padding may be anywhere.

    Raises:
        ValueError: the mask has another shape.
    """
    if mask.dim() != 2:
        raise ValueError(f"yaongi: attention_mask must be (B, L), got {tuple(mask.shape)}")
    text = mask != 0
    if bool(text.all()):
        return None
    padding = text.shape[1] - text.sum(1, keepdim=True)
    order = text.int().sort(dim=1, stable=True).indices
    back = (padding + text.cumsum(1) - 1).clamp(min=0)
    places = torch.arange(text.shape[1], device=mask.device)
    return Alignment(order, back, (places >= padding).int())


def rows_of(tensor: Tensor, places: Tensor) -> Tensor:
    """Return tensor (B, L, …) at places (B, M) of each row: (B, M, …)."""
    return tensor[torch.arange(len(tensor), device=tensor.device).unsqueeze(-1), places]
