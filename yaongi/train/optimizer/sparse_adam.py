"""Adam on the rows of a table that have a gradient: only their weights and moments change."""

import math

import torch


def adam_rows(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    parameter: torch.Tensor,
) -> None:
    """Do one step, in place, without weight decay.

    Args:
        weight: (R, D), float32: the master copy, or the parameter itself.
        gradient: (R, D), sparse along R or dense; rows that are all zero count as having no gradient.
        exp_avg, exp_avg_sq: (R, D), the moments.
        step: number of this step, from 1, for the bias correction of the moments.
        parameter: (R, D), receives the new rows in its own dtype.
    """
    rows, values = _rows(gradient)
    values = values.to(weight.dtype)
    beta1, beta2 = betas
    mean = exp_avg[rows].lerp_(values, 1 - beta1)
    square = exp_avg_sq[rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
    exp_avg[rows], exp_avg_sq[rows] = mean, square
    denominator = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(eps)
    changed = weight[rows].addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))
    weight[rows] = changed
    if parameter.data_ptr() != weight.data_ptr():
        parameter[rows] = changed.to(parameter.dtype)


def _rows(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers (n,) of the rows that aren't zero, and their gradients (n, D)."""
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        some = values.any(-1)
        return rows[some], values[some]
    rows = gradient.any(-1).nonzero().squeeze(-1)
    return rows, gradient[rows]
