"""The likeliest token in plain torch."""

import math

import torch

Tensor = torch.Tensor


def likeliest_reference(logits: Tensor) -> Tensor:  # (B, V) → (B)
    """Return the smallest id among the largest logits, −1 where these are not finite."""
    highest, best = logits.max(-1)
    return torch.where(highest.abs() < math.inf, best, -1)
