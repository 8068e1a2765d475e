"""The products in plain torch."""

import torch
from torch.nn import functional as F

Tensor = torch.Tensor


def linear_step_reference(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (N, D)
    addend: Tensor | None,  # (T, N)
    activation: str | None,
    wide: bool,
    settled: bool,
) -> Tensor:  # (T, N)
    """Return activation(x·weightᵀ) + addend, in at least float32 if `wide`."""
    if wide:
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, weight, addend = x.to(dtype), weight.to(dtype), None if addend is None else addend.to(dtype)
    if activation == "squared_relu":
        y = F.linear(x, weight).relu().square()
        return y if addend is None else y + addend
    return F.linear(x, weight) if addend is None else torch.addmm(addend, x, weight.T)


def linear_steps_reference(
    x: Tensor,  # (T, D)
    weights: list[Tensor],  # (N, D) each
    settled: bool,
) -> list[Tensor]:  # (T, N) each
    """Return x·weightᵀ for each weight."""
    return [F.linear(x, weight) for weight in weights]
