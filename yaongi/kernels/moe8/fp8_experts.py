"""The experts in FP8 in Triton: the stages of ../moe with 8-bit operands, and both weights' gradients in 16 bits."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from yaongi.kernels.moe.dispatch import dispatch, moe_combine
from yaongi.kernels.moe.experts_backward import moe_dh, moe_dw, moe_dw_cuda
from yaongi.kernels.moe.experts_forward import moe_up
from yaongi.kernels.moe.grouped_gemm import Fp8, moe_grouped_gemm

Tensor = torch.Tensor


def moe8_triton(
    x8: Tensor,
    unit_x: Tensor,
    w_up8: Tensor,
    w_down8: Tensor,
    unit_up: Tensor,
    unit_down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    scale: Tensor,
    amax: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute what `moe8_reference` does, in float16 or bfloat16."""
    T, K = expert_ids.shape
    if not T:
        return x8.new_empty(x8.shape, dtype=dtype), x8.new_empty(0, w_up8.shape[1])
    plan = dispatch(expert_ids, len(w_up8))
    a8 = moe_up(x8, w_up8.contiguous(), plan, Fp8(unit_up, scale, dtype, unit_x, amax=amax))
    parts = moe_grouped_gemm(a8, w_down8.contiguous(), plan, expert_weights.contiguous(), Fp8(unit_down, scale, dtype))
    return moe_combine(parts, plan.row, T, K, residual), a8


def moe8_backward_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `moe8_backward_reference` does."""
    return _backward(functools.partial(moe_dw, accumulate=True), *arguments)


def moe8_backward_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `moe8_backward_reference` does, the weights' gradients in CUDA."""
    return _backward(moe_dw_cuda, *arguments)


def _backward(
    weight_gradient: Callable[..., None],
    d8: Tensor,
    unit_d: Tensor,
    dy: Tensor,
    x: Tensor,
    w_up8t: Tensor,
    w_down8t: Tensor,
    unit_up: Tensor,
    unit_down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    a8: Tensor,
    unit_a: Tensor,
    scale: Tensor,
    amax: Tensor,
    addend: Tensor | None,
    dw_up: Tensor | None,
    dw_down: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add to the weights' gradients; return dx, dexpert_weights and dH in FP8. The dispatch is computed once more."""
    T, K = expert_ids.shape
    if not T:
        return dy.new_empty(dy.shape), expert_weights.new_empty(T, K), a8.new_empty(a8.shape)
    plan = dispatch(expert_ids, len(w_up8t))
    fp8 = Fp8(unit_down, scale, dy.dtype, unit_d, unit_a, amax)
    dh, ga, dweights, dh8 = moe_dh(d8, w_down8t.contiguous(), a8, plan, expert_weights.contiguous(), fp8)
    if dw_up is not None:
        weight_gradient(dh, x, dw_up, plan, gather_left=False)
    if dw_down is not None:
        weight_gradient(ga, dy, dw_down, plan, gather_left=True)
    del dh, ga  # memory peaks with the rows of dx
    parts = moe_grouped_gemm(dh8, w_up8t.contiguous(), plan, None, Fp8(unit_up, scale, dy.dtype))
    return moe_combine(parts, plan.row, T, K, addend), dweights.view(T, K), dh8
