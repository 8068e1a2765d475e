"""`linear_step` in Triton, bound by reading the weight once."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.early_launch import early_launch, fetch_into_l2, let_next_start, wait_for_previous
from yaongi.kernels.common.few_rows import few_rows_dot
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv
from yaongi.kernels.linear_step.one_row_linear import AT_ONCE, one_row_linear, one_row_linears

Tensor = torch.Tensor


@dataclass(frozen=True)
class Config:
    """Rows of the weight per program, the inner elements that are loaded at a time, and launch options."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By the weight's rows: short ones make few programs, so that each must have more bytes on the way.
CONFIGS = {4096: Config(16, 256, 1, 6), 16384: Config(16, 256, 1, 4), 2**31: Config(64, 128, 4, 4)}


@triton.jit
def _linear_step_kernel(
    x_ptr,  # (T, D)
    w_ptr,  # (N, D), contiguous
    addend_ptr,  # (T, N)
    y_ptr,  # (T, N), contiguous
    T,
    D,
    N,
    stride_x,
    stride_a,
    SQUARED_RELU: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    EARLY: tl.constexpr,
    EVEN: tl.constexpr,
    LINES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute y = activation(x·wᵀ) + addend for some rows of w."""
    let_next_start(EARLY)
    t, n = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if EVEN:
        fetch_into_l2(w_ptr + n.to(tl.int64)[:, None] * D + 64 * tl.arange(0, LINES)[None, :], EARLY)
    wait_for_previous(EARLY)
    known, mask = t < T, (t < T)[None, :] & (n < N)[:, None]
    y = few_rows_dot(x_ptr + t[:, None] * stride_x, known[:, None], w_ptr, n[:, None], D, N, EVEN, BLOCK_K)
    if SQUARED_RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y *= y
    if HAS_ADDEND:
        y += tl.load(addend_ptr + t[None, :] * stride_a + n[:, None], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + t[None, :] * N + n[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)


def _lines(D: int, N: int) -> int:
    """Return how many cache lines of 128 bytes of each row of the weight are fetched early, 4 to 8 MB in all."""
    return 1 << (min(max(1, D // 64), max(1, 2**16 // N)).bit_length() - 1)


def linear_step_triton(
    x: Tensor, weight: Tensor, addend: Tensor | None, activation: str | None, wide: bool, settled: bool
) -> Tensor:
    """Compute what `linear_step_reference` does, for up to 16 rows in float16 or bfloat16."""
    (T, D), N = x.shape, weight.shape[0]
    y = torch.empty(T, N, dtype=torch.float32 if wide else x.dtype, device=x.device)
    if not y.numel():
        return y
    if T == 1:
        one_row_linear(x, weight, addend, activation, settled, y)
        return y
    config = next(config for most, config in CONFIGS.items() if most >= N)
    launcher(_linear_step_kernel, (cdiv(N, config.block_n),))(
        x,
        weight.contiguous(),
        addend,
        y,
        T,
        D,
        N,
        x.stride(0),
        0 if addend is None else addend.stride(0),
        SQUARED_RELU=activation == "squared_relu",
        HAS_ADDEND=addend is not None,
        **early_launch(x),
        LINES=_lines(D, N),
        EVEN=D % config.block_k == 0 and N % config.block_n == 0,
        ROWS=8 if T <= 8 else 16,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


def linear_steps_triton(x: Tensor, weights: list[Tensor], settled: bool) -> list[Tensor]:
    """Compute what `linear_steps_reference` does, for up to 16 rows in float16 or bfloat16."""
    if len(x) != 1:
        return [linear_step_triton(x, weight, None, None, False, settled) for weight in weights]
    ys = [torch.empty(1, len(weight), dtype=x.dtype, device=x.device) for weight in weights]
    for start in range(0, len(weights), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        one_row_linears(x, weights[some], settled, ys[some])
    return ys
