"""`linear_step` of one row in Triton: a program holds its rows of the weight in registers, and adds up across them.

All its loads are under way at once. Of a settled weight they are so before the kernel ahead has ended. One launch walks
several weights one after another.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.early_launch import early_launch, let_next_start, wait_for_previous
from yaongi.kernels.common.few_rows import RowTile
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv, next_power_of_2

Tensor = torch.Tensor

# By the weight's rows. Programs of a small weight are all there at once, so each fetches all its elements at once.
TILES = {4096: RowTile(4, 4096, 4), 2**31: RowTile(4, 2048, 4)}
PROGRAMS = 64  # at least, if the weight has so many rows
AT_ONCE = 3  # weights that one launch walks at most


@triton.jit
def _of_block(block, w_ptr, y_ptr, N, next_w_ptr, next_y_ptr, next_N, BLOCK_N: tl.constexpr):
    """Return a block's place in its weight, that weight, its y and N: these ones, or behind their end the next ones."""
    blocks = tl.cdiv(N, BLOCK_N)
    behind = block >= blocks
    return (
        tl.where(behind, block - blocks, block),
        tl.where(behind, next_w_ptr, w_ptr),
        tl.where(behind, next_y_ptr, y_ptr),
        tl.where(behind, next_N, N),
    )


@triton.jit
def _one_row_linear_kernel(
    x_ptr,  # (D)
    addend_ptr,  # (N), of a weight alone
    D,
    w_ptr,  # (N, D), contiguous
    y_ptr,  # (N)
    N,
    second_w_ptr,  # these and the third ones like the first, or None
    second_y_ptr,
    second_N,
    third_w_ptr,
    third_y_ptr,
    third_N,
    SQUARED_RELU: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    SETTLED: tl.constexpr,
    EARLY: tl.constexpr,
    EVEN: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute y = activation(w·x) + addend for some rows of one w."""
    let_next_start(EARLY)
    block = tl.program_id(0)
    if second_w_ptr is not None:
        block, w_ptr, y_ptr, N = _of_block(block, w_ptr, y_ptr, N, second_w_ptr, second_y_ptr, second_N, BLOCK_N)
    if third_w_ptr is not None:
        block, w_ptr, y_ptr, N = _of_block(block, w_ptr, y_ptr, N, third_w_ptr, third_y_ptr, third_N, BLOCK_N)
    n, k = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
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
    _launch(x, addend, activation, settled, [weight], [y])


def one_row_linears(x: Tensor, weights: Sequence[Tensor], settled: bool, ys: Sequence[Tensor]) -> None:
    """Write to each y (1, N) the product of x (1, D) with a weight (N, D), for up to AT_ONCE weights."""
    _launch(x, None, None, settled, weights, ys)


def _launch(
    x: Tensor,
    addend: Tensor | None,
    activation: str | None,
    settled: bool,
    weights: Sequence[Tensor],
    ys: Sequence[Tensor],
) -> None:
    D, widths = x.shape[1], [weight.shape[0] for weight in weights]
    tile = next(tile for most, tile in TILES.items() if most >= sum(widths))
    block_k = tile.inner(D)
    block_n = max(1, min(tile.block_n, next_power_of_2(sum(widths) // PROGRAMS)))
    products: list[Any] = [t for w, y, n in zip(weights, ys, widths, strict=True) for t in (w.contiguous(), y, n)]
    launcher(_one_row_linear_kernel, (sum(cdiv(n, block_n) for n in widths),))(
        x,
        addend,
        D,
        *products,
        *[None] * (3 * AT_ONCE - len(products)),
        SQUARED_RELU=activation == "squared_relu",
        HAS_ADDEND=addend is not None,
        SETTLED=settled and all(weight.is_contiguous() for weight in weights),
        **early_launch(x),
        EVEN=D % block_k == 0 and all(n % block_n == 0 for n in widths),
        STEPS=cdiv(D, block_k),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=tile.num_warps,
    )
