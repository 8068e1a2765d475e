"""Projections without bias, and the depthwise convolution's weights. Precision by role enters here.

Autograd adds up the gradients of several micro-batches by writing each one in the weight's dtype, casting it, and
adding the cast: 20 bytes a parameter in bfloat16; sparse ones it lays end to end, and copies all of them each time.
Within `gradients_in_place` the backward pass of projections, head, experts and Engram's tables adds to the float32
gradient that the weight has already, and hands autograd none.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from yaongi.model.config import RolePrecision

Tensor = torch.Tensor


_in_place = False


@contextlib.contextmanager
def gradients_in_place(enabled: bool = True) -> Iterator[None]:
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


def gradient_to_add_to(weight: nn.Parameter) -> Tensor | None:
    """The weight's gradient, at least float32, within `gradients_in_place`; None outside, or where it has none yet."""
    if not _in_place or not torch.is_grad_enabled() or not weight.requires_grad:
        return None
    return weight.grad


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a·b; a total wider than a and b takes the sum before it is rounded, where torch has such a product."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


class _AddingLinear(torch.autograd.Function):
    """x · weightᵀ, added to `into` if that is given; the backward pass adds the weight's gradient to `gradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gradient: Tensor, into: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        if into is not None:
            ctx.mark_dirty(into)
        return _product(x, weight, into)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (dy,) = grads
        add_product(ctx.gradient, dy.flatten(0, -2).T, x.flatten(0, -2))
        return dy @ weight if ctx.needs_input_grad[0] else None, None, None, dy if ctx.needs_input_grad[3] else None


def _product(x: Tensor, weight: Tensor, into: Tensor | None) -> Tensor:
    return F.linear(x, weight) if into is None else into.addmm_(x, weight.T)


class _Branch(torch.autograd.Function):
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
        add_product(ctx.gradient, dy.T, x.flatten(0, -2))
        return dx.addmm_(dy, weight).view(x.shape), None, None


class AddingEmbedding(torch.autograd.Function):
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


class Linear(nn.Module):
    """x · weightᵀ, weight (outputs, inputs).

    `precision` is that of the product's operands: "bf16" takes them as they are. Raises ValueError for "fp8", which is
    not available yet.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        device: torch.device | None,
        dtype: torch.dtype,
        precision: RolePrecision = "bf16",
    ) -> None:
        super().__init__()
        if precision != "bf16":
            raise ValueError(f"linear: wanted precision 'bf16' (fp8 is not available yet), got {precision!r}")
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=dtype))

    def forward(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """(…, inputs) to (…, outputs); from (T, inputs) also added to `into` (T, outputs), in place, rounded once."""
        gradient = gradient_to_add_to(self.weight)
        if gradient is None:
            return _product(x, self.weight, into)
        return _AddingLinear.apply(x, self.weight, gradient, into)

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(…, inputs) to (…, outputs), and x for another product or kernel that reads it.

        Within `gradients_in_place` the two gradients of x are added in this product, not by a pass over both.
        """
        gradient = gradient_to_add_to(self.weight)
        if gradient is None or not x.requires_grad:
            return self(x), x
        return _Branch.apply(x, self.weight, gradient)


class Embedding(nn.Module):
    """Rows of a table, (rows, width)."""

    def __init__(self, rows: int, width: int, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, device=device, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """(…) whole numbers to (…, width)."""
        return F.embedding(ids, self.weight)


class DepthwiseConv(nn.Module):
    """The weights of a causal convolution over each channel: weight (channels, 1, taps), bias (channels) or None."""

    def __init__(
        self, channels: int, taps: int, device: torch.device | None, dtype: torch.dtype, *, bias: bool
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None

    @property
    def taps(self) -> Tensor:
        """The weight as the ops take it: (channels, taps)."""
        return self.weight.squeeze(1)
