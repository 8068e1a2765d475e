"""Column sums in Triton: many programs each write one row of a parameter's gradient, and one pass adds the rows."""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv, next_power_of_2

Tensor = torch.Tensor
BLOCK_N, BLOCK_D = 128, 32
ELEMENTS_PER_WARP = 512


@triton.jit
def _column_sums_kernel(
    partial_ptr,  # (S, N, D), fp32
    sums_ptr,  # (S, D), fp32
    N,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add all rows of BLOCK_D columns per program, always in the same order."""
    partial_ptr += tl.program_id(1).to(tl.int64) * N * D
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        total += tl.load(partial_ptr + row * D + column, mask=(row < N) & (column < D), other=0.0)
    tl.store(sums_ptr + tl.program_id(1) * D + column, tl.sum(total, 0), mask=column < D)


def column_sums(partial: Tensor) -> Tensor:
    """Return the sums over N, (S, D), of partial sums (S, N, D), contiguous and fp32; zeros where N is 0."""
    S, N, D = partial.shape
    sums = torch.empty(S, D, dtype=torch.float32, device=partial.device)
    block_n = min(BLOCK_N, next_power_of_2(max(1, N)))
    warps = max(1, block_n * BLOCK_D // ELEMENTS_PER_WARP)
    launcher(_column_sums_kernel, (cdiv(D, BLOCK_D), S))(
        partial, sums, N, D, BLOCK_N=block_n, BLOCK_D=BLOCK_D, num_warps=warps
    )
    return sums
