"""Projections without bias, embeddings, and the depthwise convolution's weights."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from yaongi.kernels import linear_step, linear_steps
from yaongi.kernels.linear_step.op import MOST_ROWS
from yaongi.model.layers.accumulation import AccumulatingLinear, ForkedLinear, accumulation_target, linear_product
from yaongi.model.layers.plain import is_plain

Tensor = torch.Tensor


class Linear(nn.Linear):
    """x · weightᵀ, weight (outputs, inputs). It is an `nn.Linear`, so that adapters and quantisers know it."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__(inputs, outputs, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Leave the values to `initialize`."""

    def forward(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """Map (…, inputs) to (…, outputs).

        Args:
            into: (T, outputs) for x (T, inputs): add the result to it, where possible in place, with one rounding.
        """
        gradient, weight = accumulation_target(self.weight), self.weight.to(x.dtype)  # float32 where FP8 is trained
        if is_step(x):
            return linear_step(x.flatten(0, -2), weight, into, settled=weight is self.weight).view(*x.shape[:-1], -1)
        if gradient is None:
            return linear_product(x, weight, into)
        return AccumulatingLinear.apply(x, weight, gradient, into)

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (…, inputs) to (…, outputs), and return x again for another product or kernel that reads it.

        Within `fused_accumulation` the backward pass of this product adds the two gradients of x; that saves a separate
        pass over both.
        """
        gradient = accumulation_target(self.weight)
        if gradient is None or not x.requires_grad:
            return self(x), x
        return ForkedLinear.apply(x, self.weight.to(x.dtype), gradient)


def is_step(x: Tensor) -> bool:
    """Return whether x (…, inputs) has few rows and there are no gradients, as in a step of generation."""
    return not torch.is_grad_enabled() and 0 < x.numel() <= MOST_ROWS * x.shape[-1]


def fork(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return module(x), and x again for its other uses: by `Linear.fork` where nothing else is in its place."""
    return module.fork(x) if is_plain(module, Linear) else (module(x), x)  # type: ignore[operator]


def step_products(x: Tensor, *modules: nn.Module) -> tuple[Tensor, ...] | None:
    """Return module(x) of each module from one product, in a step where all are the model's own; elsewhere None."""
    if not is_step(x) or not all(is_plain(module, Linear) for module in modules):
        return None
    own: list[Any] = [module.weight for module in modules]
    weights = [weight.to(x.dtype) for weight in own]
    settled = all(weight is kept for weight, kept in zip(weights, own, strict=True))
    ys = linear_steps(x.flatten(0, -2), weights, settled=settled)
    return tuple(y.view(*x.shape[:-1], -1) for y in ys)


def add_linear(module: nn.Module, x: Tensor, total: Tensor) -> Tensor:
    """Return total + module(x), where possible in place and with one rounding; x (T, inputs), total (T, outputs)."""
    return module(x, total) if is_plain(module, Linear) else total + module(x)


class Embedding(nn.Embedding):
    """Rows of a table, (rows, width)."""

    def __init__(self, rows: int, width: int, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__(rows, width, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Leave the values to `initialize`."""

    def forward(self, ids: Tensor) -> Tensor:
        """Map integers (…) to rows (…, width)."""
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
        """The weight in the shape that the ops take: (channels, taps)."""
        return self.weight.squeeze(1)
