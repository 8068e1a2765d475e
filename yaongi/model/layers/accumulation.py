"""Gradient accumulation fused into the backward pass: products add to the weight's float32 gradient themselves.

Autograd would write each micro-batch's gradient in the weight's dtype, cast it, and add the cast: 20 bytes per
parameter in bfloat16. Within `fused_accumulation` the backward pass of projections, head, experts and Engram's tables
adds to the gradient that the weight has already, and hands autograd none. Where an input has two readers
(`ForkedLinear`, `RouterProduct`), the second reader's gradient is an addend of the product, in place: it must belong to
nobody else, as the results of products do.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor

_in_place = False


@contextlib.contextmanager
def fused_accumulation(enabled: bool = True) -> Iterator[None]:
    """Within the block, forward and backward pass, weights that have a gradient add to it themselves.

    For training loops alone: `torch.autograd.grad` finds no gradient of these weights there, and hooks on them are not
    called.
    """
    global _in_place
    before, _in_place = _in_place, enabled
    try:
        yield
    finally:
        _in_place = before


def accumulation_target(weight: nn.Parameter) -> Tensor | None:
    """The weight's gradient, at least float32, within `fused_accumulation`; None outside, or where it has none yet."""
    if not _in_place or not torch.is_grad_enabled() or not weight.requires_grad:
        return None
    return weight.grad


def accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a·b; a total wider than a and b takes the sum before it is rounded, where torch has such a product."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


class AccumulatingLinear(torch.autograd.Function):
    """x · weightᵀ, added to `into` if that is given; the backward pass adds the weight's gradient to `gradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gradient: Tensor, into: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        if into is not None:
            ctx.mark_dirty(into)
        return linear_product(x, weight, into)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (dy,) = grads
        accumulate_product(ctx.gradient, dy.flatten(0, -2).T, x.flatten(0, -2))
        return dy @ weight if ctx.needs_input_grad[0] else None, None, None, dy if ctx.needs_input_grad[3] else None


def linear_product(x: Tensor, weight: Tensor, into: Tensor | None) -> Tensor:
    return F.linear(x, weight) if into is None else into.addmm_(x, weight.T)


class ForkedLinear(torch.autograd.Function):
    """x · weightᵀ, and x itself for its other readers, whose gradient takes this one's as an addend of the product.

    The addition is in place: what the other readers hand back must belong to nobody else, as products' results do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        return F.linear(x, weight), x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        dy, dx = (grad.flatten(0, -2) for grad in grads)
        accumulate_product(ctx.gradient, dy.T, x.flatten(0, -2))
        return dx.addmm_(dy, weight).view(x.shape), None, None


class AccumulatingEmbedding(torch.autograd.Function):
    """Rows of a table, (…) to (…, width), whose backward pass adds to these rows of `gradient`, which is dense."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.gradient = gradient
        return F.embedding(rows, table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (rows,) = ctx.saved_tensors
        ctx.gradient.index_add_(0, rows.flatten(), grads[0].flatten(0, -2).to(ctx.gradient.dtype))
        return None, None, None
