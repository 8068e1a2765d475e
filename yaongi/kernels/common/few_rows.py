"""Products of few rows with a large matrix: bound by reading the matrix once.

`few_rows_dot`: the matrix is the tensor cores' first operand, for these take 16 rows of it but only 8 of the other. An
element of the result is one sum in ascending order, whatever the other rows are. `RowTile`: one row alone needs no
tensor cores, and the matrix goes into registers.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from yaongi.kernels.common.sizes import next_power_of_2


@dataclass(frozen=True)
class RowTile:
    """The matrix's rows that a program holds in registers, the inner elements that it takes at a time, and warps."""

    block_n: int
    block_k: int
    num_warps: int

    def inner(self, size: int) -> int:
        """Return how many elements are taken at a time of so many."""
        return min(self.block_k, max(16, next_power_of_2(size)))


@triton.jit
def few_rows_dot(
    rows_ptr,  # (ROWS, 1), the start of each row
    known,  # (ROWS, 1), whether there is such a row
    w_ptr,  # (width, inner), contiguous
    n,  # (BLOCK_N, 1), the matrix's rows
    inner,
    width,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return w·rowsᵀ, (BLOCK_N, ROWS) fp32; with EVEN the blocks divide the matrix."""
    total = tl.zeros((n.shape[0], known.shape[0]), tl.float32)
    w_rows = w_ptr + n.to(tl.int64) * inner
    for k in range(0, inner, BLOCK_K):
        i = k + tl.arange(0, BLOCK_K)[None, :]
        if EVEN:
            rows, w = tl.load(rows_ptr + i, mask=known, other=0.0), tl.load(w_rows + i)
        else:
            rows = tl.load(rows_ptr + i, mask=known & (i < inner), other=0.0)
            w = tl.load(w_rows + i, mask=(n < width) & (i < inner), other=0.0)
        total = tl.dot(w, rows.T, total)
    return total
