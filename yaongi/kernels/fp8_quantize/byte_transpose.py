"""The transpose of bytes in Triton, four by four: words are loaded, transposed and stored, never single bytes."""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv

Tensor = torch.Tensor
WORDS, WARPS = 32, 4  # a program's block: 128 rows × 32 words, that is 128 × 128 bytes


@triton.jit
def _transpose8_kernel(
    x_ptr,  # (batch, 4·ROW_GROUPS, WORD_COLUMNS), int32: four bytes of a row
    y_ptr,  # (batch, 4·WORD_COLUMNS, ROW_GROUPS), int32, contiguous
    row_groups,
    word_columns,
    stride_batch,
    stride_row,
    WORDS: tl.constexpr,
):
    """Transpose 4·WORDS × 4·WORDS bytes.

    Word j of rows 4i to 4i + 3 holds a block of 4 × 4 bytes, a0 a1 a2 a3 / b0 b1 b2 b3 / c… / d…. Its columns are the
    words a0 b0 c0 d0, a1 b1 c1 d1 and so on, and go to word i of rows 4j to 4j + 3.
    """
    i = (tl.program_id(1) * WORDS + tl.arange(0, WORDS)).to(tl.int64)[:, None]
    j = (tl.program_id(0) * WORDS + tl.arange(0, WORDS)).to(tl.int64)[None, :]
    batch = tl.program_id(2).to(tl.int64)
    mask = (i < row_groups) & (j < word_columns)
    place = x_ptr + batch * stride_batch + 4 * i * stride_row + j
    a = tl.load(place, mask=mask, other=0)
    b = tl.load(place + stride_row, mask=mask, other=0)
    c = tl.load(place + 2 * stride_row, mask=mask, other=0)
    d = tl.load(place + 3 * stride_row, mask=mask, other=0)
    EVEN: tl.constexpr = 0x00FF00FF  # bytes 0 and 2
    ab_even, ab_odd = (a & EVEN) | ((b & EVEN) << 8), ((a >> 8) & EVEN) | (((b >> 8) & EVEN) << 8)
    cd_even, cd_odd = (c & EVEN) | ((d & EVEN) << 8), ((c >> 8) & EVEN) | (((d >> 8) & EVEN) << 8)
    place = y_ptr + batch * row_groups * word_columns * 4 + tl.trans(4 * j * row_groups + i)
    mask = tl.trans(mask)
    tl.store(place, tl.trans((ab_even & 0xFFFF) | (cd_even << 16)), mask=mask)
    tl.store(place + row_groups, tl.trans((ab_odd & 0xFFFF) | (cd_odd << 16)), mask=mask)
    tl.store(place + 2 * row_groups, tl.trans(((ab_even >> 16) & 0xFFFF) | ((cd_even >> 16) << 16)), mask=mask)
    tl.store(place + 3 * row_groups, tl.trans(((ab_odd >> 16) & 0xFFFF) | ((cd_odd >> 16) << 16)), mask=mask)


def transpose8_triton(x8: Tensor) -> Tensor:
    """Compute what `transpose8_reference` does, for T and D above 1 that are multiples of 4."""
    *batch, T, D = x8.shape
    y8 = torch.empty(*batch, D, T, dtype=x8.dtype, device=x8.device)
    if x8.numel():
        x, y = (t.squeeze().view(torch.int32) for t in (x8, y8))  # a dimension of size 1 may have any stride
        x, y = (t[None] if t.dim() == 2 else t.flatten(0, -3) for t in (x, y))
        groups, words = T // 4, D // 4
        grid = cdiv(words, WORDS), cdiv(groups, WORDS), x.shape[0]
        launcher(_transpose8_kernel, grid)(x, y, groups, words, x.stride(0), x.stride(1), WORDS=WORDS, num_warps=WARPS)
    return y8
