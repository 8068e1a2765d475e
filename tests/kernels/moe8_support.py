"""The experts in FP8 composed of plain torch: autograd, with casts whose gradient passes straight through."""

from typing import Any, NamedTuple

import torch

from yaongi.kernels import quantize_weight8

Tensor = torch.Tensor


class Scales(NamedTuple):
    """The scales of what is cast."""

    x: Tensor
    a: Tensor
    d: Tensor  # the gradient of y
    h: Tensor  # the gradient before the squared ReLU


def cast(values: Tensor, scale: Tensor) -> Tensor:
    """What a tensor is after its cast to FP8 and back."""
    scale = scale.to(values.dtype)
    return (values * scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(values.dtype) / scale


def cast_weight(w: Tensor) -> Tensor:
    """What a weight is after its cast to FP8 and back."""
    w8, _, unit = quantize_weight8(w.detach())
    return w8.to(w.dtype) * unit


class Up(torch.autograd.Function):
    """x·wᵀ of casts; the gradient of x is a product of casts, that of w is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, w8: Tensor, scales: Scales) -> Tensor:
        ctx.save_for_backward(x, w8)
        ctx.scale = scales.h
        return cast(x, scales.x) @ w8.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w8 = ctx.saved_tensors
        return cast(grads[0], ctx.scale) @ w8, grads[0].T @ x, None, None


class Down(torch.autograd.Function):
    """g·(relu(h)²·wᵀ) of casts; relu(h)² is its cast in every gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, g: Tensor, w: Tensor, w8: Tensor, scales: Scales) -> Tensor:
        a = cast(h.relu().square(), scales.a)
        ctx.save_for_backward(a, g, w8)
        ctx.scale = scales.d
        return g[:, None] * (a @ w8.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, g, w8 = ctx.saved_tensors
        dact = cast(grads[0], ctx.scale) @ w8
        dh = 2 * a.sqrt() * (g[:, None] * dact)
        return dh, (dact * a).sum(1), grads[0].T @ (g[:, None] * a), None, None


def experts8(x: Tensor, w_up: Tensor, w_down: Tensor, ids: Tensor, weights: Tensor, scales: Scales) -> Tensor:
    """Return Σ_k g_tk · W_down[e]·relu(W_up[e]·x_t)² with all products of casts; every expert sees every token."""
    up8, down8 = cast_weight(w_up), cast_weight(w_down)
    y = torch.zeros_like(x)
    for expert in range(len(w_up)):
        g = (weights * (ids == expert)).sum(1)
        h = Up.apply(x, w_up[expert], up8[expert], scales)
        y = y + Down.apply(h, g, w_down[expert], down8[expert], scales)
    return y
