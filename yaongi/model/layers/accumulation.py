"""Gradient accumulation fused into the backward pass: matrix products add directly to the weight's float32 gradient.

Autograd would write each micro-batch's gradient in the weight's dtype, cast it, and add the cast: 20 bytes of memory
traffic per parameter in bfloat16. Within `fused_accumulation` the backward pass of projections, head, experts and
Engram tables adds to the existing gradient of the weight, and returns none to autograd.

If an input is used twice (`ForkedLinear`, `RouterProduct`), the product also adds the gradient of the other use, in
place. That gradient must not alias another tensor; a fresh result of a product does not.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from yaongi.model.layers.compiled import on_gpu

Tensor = torch.Tensor

_in_place = False


@contextlib.contextmanager
def fused_accumulation(enabled: bool = True) -> Iterator[None]:
    """Accumulate in place within the block, which must hold the forward and the backward pass.

    It applies to weights that have a gradient already. It is for training loops only: `torch.autograd.grad` finds no
    gradient of these weights in the block, and hooks on them are not called.
    """
    global _in_place
    before, _in_place = _in_place, enabled
    try:
        yield
    finally:
        _in_place = before


def accumulation_target(weight: Tensor) -> Tensor | None:
    """Return the gradient to accumulate into; None outside `fused_accumulation` or if the weight has none yet."""
    if not _in_place or not torch.is_grad_enabled() or not weight.requires_grad:
        return None
    return weight.grad


def accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Do total += a·b. On a GPU a `total` wider than a and b takes the product before it is rounded to their dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif not on_gpu(a):  # in a GPU's plan nothing is made, and torch 2.11 knows no out_dtype on the meta device
        total.add_(a @ b)


class AccumulatingLinear(torch.autograd.Function):
    """x · weightᵀ, added to `into` if given; the backward pass adds the weight's gradient to `gradient`."""

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
    """x · weightᵀ, and x again for its other uses; the backward pass adds both gradients of x within one product.

    The addition is in place: the gradient from the other uses must not alias another tensor.
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
    """Rows of a table, (…) to (…, width); the backward pass adds to the same rows of the dense `gradient`."""

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
