"""`mamba_step` in Triton, bound by reading and writing the state once."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.early_launch import early_launch, fetch_into_l2, let_next_start, wait_for_previous
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv, next_power_of_2
from yaongi.kernels.mamba_scan.decays import softplus

Tensor = torch.Tensor


@dataclass(frozen=True)
class Config:
    """Rows of one head's state per program, and warps."""

    block_p: int
    num_warps: int


STEP = Config(block_p=64, num_warps=8)  # fastest for batches of 1 and 64 with 64 heads; H100, 2026-11-24 (docs/LAB.md)


@triton.jit
def _mamba_step_kernel(
    state_ptr,  # (B, H, P, N), updated in place
    x_ptr,  # (B, H, P)
    dt_ptr,  # (B, H)
    A_ptr,  # (H)
    b_ptr,  # (B, G, N)
    c_ptr,  # (B, G, N)
    D_ptr,  # (H)
    bias_ptr,  # (H)
    y_ptr,  # (B, H, P), contiguous
    H,
    P,
    N,
    heads_per_group,
    stride_sb,
    stride_sh,
    stride_sp,
    stride_sn,
    stride_xb,
    stride_xh,
    stride_tb,
    stride_th,
    stride_bb,
    stride_bg,
    stride_cb,
    stride_cg,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute h ← exp(δ·A)·h + δ·x ⊗ b and y = h·c + D·x."""
    let_next_start(EARLY)
    head, batch = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    group = head // heads_per_group
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    state_ptr += batch * stride_sb + head * stride_sh
    rows, lines = tl.minimum(p, P - 1).to(tl.int64), tl.minimum(tl.arange(0, LINES) * (BLOCK_N // LINES), N - 1)
    fetch_into_l2(state_ptr + rows[:, None] * stride_sp + lines[None, :] * stride_sn, EARLY)
    wait_for_previous(EARLY)
    place = p.to(tl.int64)[:, None] * stride_sp + n[None, :] * stride_sn
    mask = (p < P)[:, None] & (n < N)[None, :]
    state = tl.load(state_ptr + place, mask=mask, other=0.0).to(tl.float32)
    raw = tl.load(dt_ptr + batch * stride_tb + head * stride_th).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + head).to(tl.float32)
    delta = softplus(raw)
    x = tl.load(x_ptr + batch * stride_xb + head * stride_xh + p, mask=p < P, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + batch * stride_bb + group * stride_bg + n, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + batch * stride_cb + group * stride_cg + n, mask=n < N, other=0.0).to(tl.float32)
    state = tl.exp(delta * tl.load(A_ptr + head)) * state + (delta * x)[:, None] * b[None, :]
    tl.store(state_ptr + place, state.to(state_ptr.dtype.element_ty), mask=mask)
    y = tl.sum(state * c[None, :], 1)
    if HAS_D:
        y += tl.load(D_ptr + head).to(tl.float32) * x
    tl.store(y_ptr + (batch * H + head) * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)


def mamba_step_triton(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
) -> Tensor:
    """Compute what `mamba_step_reference` does, for N of 1 to 1024."""
    B, H, P, N = state.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not state.numel():
        return y
    block_p = min(STEP.block_p, next_power_of_2(P))
    block_n = next_power_of_2(N)
    launcher(_mamba_step_kernel, (B * H, cdiv(P, block_p)))(
        state,
        x,
        dt,
        A.contiguous(),
        b,
        c,
        None if D is None else D.contiguous(),
        None if dt_bias is None else dt_bias.contiguous(),
        y,
        H,
        P,
        N,
        H // b.shape[1],
        *state.stride(),
        *x.stride()[:2],
        *dt.stride(),
        *b.stride()[:2],
        *c.stride()[:2],
        HAS_D=D is not None,
        HAS_BIAS=dt_bias is not None,
        **early_launch(x),
        LINES=max(1, block_n * state.element_size() // 128),  # of a row of the state
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=STEP.num_warps,
    )
    return y
