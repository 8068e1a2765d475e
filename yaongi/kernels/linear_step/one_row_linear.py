"""`linear_step` of one row in Triton: a program holds its rows of the weight in registers, and adds up across them.

All its loads are under way at once. Of a settled weight they are so before the kernel ahead has ended.
"""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.early_launch import early_launch, let_next_start, wait_for_previous
from yaongi.kernels.common.few_rows import RowTile

Tensor = torch.Tensor

# By the weight's rows. Programs of a small weight are all there at once, so each fetches all its elements at once.
TILES = {4096: RowTile(4, 4096, 4), 2**31: RowTile(4, 2048, 4)}
PROGRAMS = 64  # at least, if the weight has so many rows


@triton.jit
def _one_row_linear_kernel(
    x_ptr,  # (D)
    w_ptr,  # (N, D), contiguous
    addend_ptr,  # (N)
    y_ptr,  # (N)
    D,
    N,
    SQUARED_RELU: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    SETTLED: tl.constexpr,
    EARLY: tl.constexpr,
    EVEN: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute y = activation(w·x) + addend for some rows of w."""
    let_next_start(EARLY)
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * D + k[None, :]
    if not SETTLED:
        wait_for_previous(EARLY)
    w = tl.load(w_ptrs) if EVEN else tl.load(w_ptrs, mask=(n < N)[:, None] & (k < D)[None, :], other=0.0)
    if SETTLED:
        wait_for_previous(EARLY)
    x = tl.load(x_ptr + k, mask=k < D, other=0.0).to(tl.float32)
    products = w.to(tl.float32) * x[None, :]
    for step in range(1, STEPS):
        i = step * BLOCK_K + k
        if EVEN:
            w = tl.load(w_ptrs + step * BLOCK_K)
        else:
            w = tl.load(w_ptrs + step * BLOCK_K, mask=(n < N)[:, None] & (i < D)[None, :], other=0.0)
        x = tl.load(x_ptr + i, mask=i < D, other=0.0).to(tl.float32)
        products += w.to(tl.float32) * x[None, :]
    y = tl.sum(products, axis=1)
    if SQUARED_RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y *= y
    if HAS_ADDEND:
        y += tl.load(addend_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def one_row_linear(
    x: Tensor, weight: Tensor, addend: Tensor | None, activation: str | None, settled: bool, y: Tensor
) -> None:
    """Write to y (1, N) what `linear_step_reference` returns, for x (1, D) in float16 or bfloat16."""
    N, D = weight.shape
    tile = next(tile for most, tile in TILES.items() if most >= N)
    block_k = tile.inner(D)
    block_n = max(1, min(tile.block_n, triton.next_power_of_2(N // PROGRAMS)))
    _one_row_linear_kernel[(triton.cdiv(N, block_n),)](
        x,
        weight.contiguous(),
        addend,
        y,
        D,
        N,
        SQUARED_RELU=activation == "squared_relu",
        HAS_ADDEND=addend is not None,
        SETTLED=settled and weight.is_contiguous(),
        **early_launch(x),
        EVEN=D % block_k == 0 and N % block_n == 0,
        STEPS=triton.cdiv(D, block_k),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=tile.num_warps,
    )
