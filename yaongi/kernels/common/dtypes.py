"""The dtype that an op computes in."""

import torch


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Float32, or float64 when an argument is; what ops accumulate in, and parameters' gradients come in."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32
