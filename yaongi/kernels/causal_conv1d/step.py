"""`causal_conv1d_step` in Triton: one kernel that reads and writes the state once."""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.early_launch import early_launch, fetch_into_l2, let_next_start, wait_for_previous
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv

Tensor = torch.Tensor

BLOCK_C = 256  # channels per program, two per thread


@triton.jit
def _causal_conv1d_step_kernel(
    x_ptr,  # (B, C)
    state_ptr,  # (B, P, C, W − 1), updated in place
    weight_ptr,  # (C, W), contiguous
    bias_ptr,  # (C)
    steps_ptr,  # (B), None for P = 1
    y_ptr,  # (B, C), contiguous
    C,
    P,
    stride_xb,
    stride_sb,
    stride_sp,
    stride_sc,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    EARLY: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute y = activation(bias + Σ_k w_k · window_k), and drop the window's oldest input."""
    let_next_start(EARLY)
    blocks = tl.cdiv(C, BLOCK_C)
    batch, c = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    state_ptr += batch * stride_sb + tl.minimum(c, C - 1).to(tl.int64) * stride_sc
    if steps_ptr is None:
        fetch_into_l2(state_ptr, EARLY)
    fetch_into_l2(weight_ptr + tl.minimum(c, C - 1) * W, EARLY)
    wait_for_previous(EARLY)
    if steps_ptr is not None:
        phase = tl.load(steps_ptr + batch) % P
        state_ptr += tl.where(phase < 0, phase + P, phase) * stride_sp
    newest = tl.load(x_ptr + batch * stride_xb + c, mask=mask, other=0.0)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for k in tl.static_range(W - 1):
        value = tl.load(state_ptr + k, mask=mask, other=0.0)
        total += value.to(tl.float32) * tl.load(weight_ptr + c * W + k, mask=mask, other=0.0).to(tl.float32)
        if k > 0:
            tl.store(state_ptr + k - 1, value, mask=mask)
    tl.store(state_ptr + W - 2, newest, mask=mask)
    total += newest.to(tl.float32) * tl.load(weight_ptr + c * W + W - 1, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    y = total * tl.sigmoid(total) if SILU else total
    tl.store(y_ptr + batch * C + c, y.to(y_ptr.dtype.element_ty), mask=mask)


def causal_conv1d_step_triton(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, steps: Tensor | None
) -> Tensor:
    """Compute what `causal_conv1d_step_reference` does, for W of 2 to 4."""
    batch, channels = x.shape
    phases = state.unsqueeze(1) if steps is None else state
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return y
    launcher(_causal_conv1d_step_kernel, (batch * cdiv(channels, BLOCK_C),))(
        x,
        state,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if steps is None else steps.contiguous(),
        y,
        channels,
        phases.shape[1],
        x.stride(0),
        *phases.stride()[:3],
        HAS_BIAS=bias is not None,
        SILU=activation == "silu",
        **early_launch(x),
        W=weight.shape[1],
        BLOCK_C=BLOCK_C,
        num_warps=4,
    )
    return y
