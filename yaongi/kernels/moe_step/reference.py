"""Routed and shared experts in plain torch; README.md in this folder has the mathematics."""

import torch
from torch.nn import functional as F

from yaongi.kernels.moe.reference import moe_reference

Tensor = torch.Tensor


def moe_step_reference(
    x: Tensor,  # (T, D)
    w_up: Tensor,  # (E, F, D)
    w_down: Tensor,  # (E, D, F)
    shared_up: Tensor,  # (S, D)
    shared_down: Tensor,  # (D, S)
    expert_ids: Tensor,  # (T, K)
    expert_weights: Tensor,  # (T, K)
    settled: bool,
) -> Tensor:  # (T, D)
    """Return what `moe_reference` does, plus shared_down·relu(shared_up·x_t)²."""
    shared = F.linear(F.linear(x, shared_up).relu().square(), shared_down)
    return moe_reference(x, w_up, w_down, expert_ids, expert_weights)[0] + shared
