"""Products of rows sorted by expert with each expert's matrix, and helpers that all stages of the experts share.

Programs beyond the last tile return at once. A tile may read rows past its expert's end; their results are not stored.
Contiguous operands are loaded through TMA descriptors, gathered ones through pointers. All sums are fp32 in a fixed
order, so results are bitwise reproducible.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.descriptors import matrix_descriptor
from yaongi.kernels.common.generations import for_gpu
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv, next_power_of_2
from yaongi.kernels.moe.dispatch import BLOCK_M, Dispatch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Config:
    """Columns and inner elements of a tile, and launch options."""

    block_n: int
    block_k: int  # of 16 bits each; twice as many 8-bit floats take the same shared memory
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Fp8:
    """What a stage of 8-bit floats needs besides its operands; the scalars are float32, on the device."""

    unit_w: Tensor  # of the experts' weights
    scale: Tensor  # of A or dH, which up and dh cast, and down and dx read
    dtype: torch.dtype  # of the results that stay wide
    unit: Tensor | None = None  # of the tokens that up and dh gather
    unit_a: Tensor | None = None  # of A in dh
    amax: Tensor | None = None  # of what is cast


SMALL = Config(block_n=128, block_k=32, num_warps=8, num_stages=3)  # fits into 99 KB of shared memory
# By GPU generation and the inner dimension's length; if short, two small tiles per SM hide each other's prologue and
# epilogue.
ROWS = {
    8: {"short": SMALL, "long": SMALL},
    9: {
        "short": Config(block_n=128, block_k=64, num_warps=4, num_stages=3),
        "long": Config(block_n=256, block_k=64, num_warps=8, num_stages=3),
    },
    12: {"short": SMALL, "long": SMALL},
}
LONG = 2048  # bytes


@triton.jit
def find_tile(offset_ptr, tile_end_ptr, tile, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the expert of a row tile (E beyond the last tile), the tile's first row, and the expert's end."""
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(tile_end_ptr + e, mask=e < E, other=2147483647)
    expert = tl.sum((ends <= tile).to(tl.int32))
    before = tl.max(tl.where(ends <= tile, ends, 0))
    known = tl.minimum(expert, E - 1)
    start = tl.load(offset_ptr + known) + (tile - before) * BLOCK_M
    return expert, start, tl.load(offset_ptr + known + 1)


@triton.jit
def expert_dot(
    left, w_desc, accumulator, expert, column, k, inner, width, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Add the product of `left` and a column tile of the expert's matrix to the accumulator.

    `left` (BLOCK_M, BLOCK_K) holds the inner elements from k on. The matrices are (E·width, inner), or with TRANSPOSED
    (E·inner, width).
    """
    if TRANSPOSED:
        accumulator = tl.dot(left, w_desc.load([expert * inner + k, column * BLOCK_N]), accumulator)
    else:
        accumulator = tl.dot(left, w_desc.load([expert * width + column * BLOCK_N, k]).T, accumulator)
    return accumulator


@triton.jit
def gathered_expert_dot(
    rows_ptr,  # (BLOCK_M, 1), the start of each gathered row
    w_desc,
    expert,
    column,
    inner,
    width,
    TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return gathered rows times a column tile of the expert's matrix, (BLOCK_M, BLOCK_N) fp32."""
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, inner, BLOCK_K):
        i = k + tl.arange(0, BLOCK_K)[None, :]
        left = tl.load(rows_ptr + i) if EVEN else tl.load(rows_ptr + i, mask=i < inner, other=0.0)
        accumulator = expert_dot(left, w_desc, accumulator, expert, column, k, inner, width, TRANSPOSED, BLOCK_N)
    return accumulator


@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "unit_w_ptr"])
def _moe_grouped_gemm_kernel(
    left_desc,  # (T·K, inner)
    w_desc,  # (E·width, inner), or with TRANSPOSED (E·inner, width)
    order_ptr,
    weight_ptr,  # (T·K), by pair
    offset_ptr,
    tile_end_ptr,
    out_ptr,  # (T·K, width)
    scale_ptr,  # (), fp32: the scale of the rows; with unit_w_ptr None unless FP8
    unit_w_ptr,  # (), fp32
    inner,
    width,
    E,
    TRANSPOSED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Compute rows times the expert's matrix: down (g·A·W_downᵀ), or unweighted the rows of dx (dH·W_up)."""
    columns = tl.cdiv(width, BLOCK_N)
    tile, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    expert, start, end = find_tile(offset_ptr, tile_end_ptr, tile, E, BLOCK_M, BLOCK_E)
    if expert < E:
        rows = start + tl.arange(0, BLOCK_M)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, inner, BLOCK_K):
            left = left_desc.load([start, k])
            accumulator = expert_dot(left, w_desc, accumulator, expert, column, k, inner, width, TRANSPOSED, BLOCK_N)
        if FP8:
            accumulator *= tl.div_rn(tl.load(unit_w_ptr), tl.load(scale_ptr))
        if WEIGHTED:
            pairs = tl.load(order_ptr + rows, mask=rows < end, other=0)
            accumulator *= tl.load(weight_ptr + pairs)[:, None]
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        place = tl.arange(0, BLOCK_M)[:, None] * width + n[None, :]
        mask = (rows < end)[:, None] & (n < width)[None, :]
        out_ptr += start.to(tl.int64) * width
        tl.store(out_ptr + place, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=1024)
def fit_block(block: int, width: int, least: int = 16) -> int:
    """Return the tile width: at most `block`, less for a narrow matrix, and half where a fifth of it would be empty."""
    wide = max(least, min(block, next_power_of_2(width)))
    padded, halved = (cdiv(width, n) * n for n in (wide, wide // 2))
    return wide // 2 if wide > 128 and padded > 1.2 * width and halved < padded else wide


def launch_options(config: Config, left: Tensor, width: int) -> dict[str, int]:
    """Return the constants and options of a launch whose left operand is `left`."""
    size = left.element_size()
    least = 64 if size == 1 else 16  # dh reads a quarter of a tile's row, else half of it: 16 bytes, the least for TMA
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": fit_block(config.block_n, width, least),
        "BLOCK_K": config.block_k * 2 // size,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def block_e(experts: int) -> int:
    """Return BLOCK_E: a power of two, so that few variants are compiled."""
    return max(16, next_power_of_2(experts))


def moe_grouped_gemm(left: Tensor, w: Tensor, plan: Dispatch, weights: Tensor | None, fp8: Fp8 | None = None) -> Tensor:
    """Return rows (T·K, inner) times their experts' w, by `weights` if given.

    Args:
        w: (E, width, inner); without `weights` (E, inner, width), but not in FP8.
        fp8: of 8-bit floats; `scale` is that of `left`.
    """
    transposed = weights is None and fp8 is None
    E, inner, width = w.shape if transposed else (w.shape[0], w.shape[2], w.shape[1])
    config = for_gpu(ROWS, left)["long" if inner * left.element_size() >= LONG else "short"]
    blocks = launch_options(config, left, width)
    out = torch.empty(left.shape[0], width, dtype=fp8.dtype if fp8 else left.dtype, device=left.device)
    box = (blocks["BLOCK_K"], blocks["BLOCK_N"]) if transposed else (blocks["BLOCK_N"], blocks["BLOCK_K"])
    launcher(_moe_grouped_gemm_kernel, (plan.tiles * cdiv(width, blocks["BLOCK_N"]),))(
        matrix_descriptor(left, BLOCK_M, blocks["BLOCK_K"]),
        matrix_descriptor(w, *box),
        plan.order,
        weights,
        plan.offset,
        plan.tile_end,
        out,
        fp8.scale if fp8 else None,
        fp8.unit_w if fp8 else None,
        inner,
        width,
        E,
        TRANSPOSED=transposed,
        WEIGHTED=weights is not None,
        FP8=fp8 is not None,
        BLOCK_E=block_e(E),
        **blocks,
    )
    return out
