"""The dtype that an op computes in."""

import torch


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Return float64 when an argument is float64, else float32: the dtype of sums and of parameters' gradients."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32
