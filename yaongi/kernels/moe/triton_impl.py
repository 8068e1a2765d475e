"""The squared-ReLU experts in Triton: a chain of fused stages over rows sorted by expert, without host synchronisation.

    dispatch   counting sort of the routed pairs: rows by expert, and their inverse            3 launches
    up         gathers x in the load of its operand, writes A = relu(H)²                       (T·K, D) → (T·K, F)
    down       multiplies by the expert weight in the accumulator, writes rows                 (T·K, F) → (T·K, D)
    combine    y_t = Σ_k of the token's rows, in order                                         (T·K, D) → (T, D)

The backward pass is another such chain: gradients/triton_impl.py.
Row tiles never cross an expert: tile i of the whole grid finds its expert from the running counts of tiles, so a grid
of ⌈T·K / BLOCK_M⌉ + E programs covers any routing, and those in excess leave at once. What a tile reads behind its
expert's end belongs to other rows, and is never stored. Operands in memory order come through the copy engine
(descriptors), gathered ones through pointers. All sums are fp32, in one order: same bits always.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from yaongi.kernels.moe.routing.triton_impl import BLOCK_M, Dispatch, dispatch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Config:
    """Columns and inner elements of a tile, and how it is run."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Found on an H100, T 32768, D 2048, E 64, K 6, F 256 to 1024, 2026-11-24 (docs/LAB.md). A row tile is BLOCK_M × block_n
UP = Config(block_n=256, block_k=64, num_warps=8, num_stages=4)
ROWS = {  # by the inner dimension: when it is short, two small tiles at a time hide each other's first and last steps
    "short": Config(block_n=128, block_k=64, num_warps=4, num_stages=3),
    "long": Config(block_n=256, block_k=64, num_warps=8, num_stages=3),
}
LONG = 1024


@triton.jit
def find_tile(offset_ptr, tile_end_ptr, tile, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert of a row tile (E when there is none), its first row, and the expert's end."""
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(tile_end_ptr + e, mask=e < E, other=2147483647)
    expert = tl.sum((ends <= tile).to(tl.int32))
    before = tl.max(tl.where(ends <= tile, ends, 0))
    known = tl.minimum(expert, E - 1)
    start = tl.load(offset_ptr + known) + (tile - before) * BLOCK_M
    return expert, start, tl.load(offset_ptr + known + 1)


@triton.jit
def times_expert(
    left, w_desc, accumulator, expert, column, k, inner, width, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds left (BLOCK_M, BLOCK_K), the inner elements from k on, times a tile of columns of the expert's matrix.

    The matrices are (E·width, inner), or with TRANSPOSED (E·inner, width).
    """
    if TRANSPOSED:
        accumulator = tl.dot(left, w_desc.load([expert * inner + k, column * BLOCK_N]), accumulator)
    else:
        accumulator = tl.dot(left, w_desc.load([expert * width + column * BLOCK_N, k]).T, accumulator)
    return accumulator


@triton.jit
def gathered_times_expert(
    rows_ptr,  # (BLOCK_M, 1), where each gathered row starts
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
    """Gathered rows times a tile of columns of the expert's matrix, (BLOCK_M, BLOCK_N) fp32."""
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, inner, BLOCK_K):
        i = k + tl.arange(0, BLOCK_K)[None, :]
        left = tl.load(rows_ptr + i) if EVEN else tl.load(rows_ptr + i, mask=i < inner, other=0.0)
        accumulator = times_expert(left, w_desc, accumulator, expert, column, k, inner, width, TRANSPOSED, BLOCK_N)
    return accumulator


@triton.jit
def _moe_up_kernel(
    x_ptr,  # (T, D)
    w_desc,  # (E·F, D)
    token_ptr,
    offset_ptr,
    tile_end_ptr,
    a_ptr,  # (T·K, F)
    D,
    F,
    E,
    stride_xt,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A = relu(x·W_upᵀ)², rows of x gathered."""
    columns = tl.cdiv(F, BLOCK_N)
    tile, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    expert, start, end = find_tile(offset_ptr, tile_end_ptr, tile, E, BLOCK_M, BLOCK_E)
    if expert < E:
        rows = start + tl.arange(0, BLOCK_M)
        tokens = tl.load(token_ptr + rows, mask=rows < end, other=0)
        x_rows = x_ptr + tokens.to(tl.int64)[:, None] * stride_xt
        accumulator = gathered_times_expert(
            x_rows, w_desc, expert, column, D, F, TRANSPOSED=False, EVEN=EVEN_D,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        hidden = tl.maximum(accumulator, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a bad weight must show in the loss
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        place = tl.arange(0, BLOCK_M)[:, None] * F + n[None, :]
        mask = (rows < end)[:, None] & (n < F)[None, :]
        a_ptr += start.to(tl.int64) * F
        tl.store(a_ptr + place, (hidden * hidden).to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _moe_rows_kernel(
    left_desc,  # (T·K, inner)
    w_desc,  # (E·D, F) as it is, or (E·F, D) transposed
    order_ptr,
    weight_ptr,  # (T·K), by pair
    offset_ptr,
    tile_end_ptr,
    out_ptr,  # (T·K, width)
    inner,
    width,
    E,
    TRANSPOSED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Rows times the expert's matrix: down (g·A·W_downᵀ) and, with the matrix transposed, dx (dH·W_up)."""
    columns = tl.cdiv(width, BLOCK_N)
    tile, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    expert, start, end = find_tile(offset_ptr, tile_end_ptr, tile, E, BLOCK_M, BLOCK_E)
    if expert < E:
        rows = start + tl.arange(0, BLOCK_M)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, inner, BLOCK_K):
            left = left_desc.load([start, k])
            accumulator = times_expert(left, w_desc, accumulator, expert, column, k, inner, width, TRANSPOSED, BLOCK_N)
        if WEIGHTED:
            pairs = tl.load(order_ptr + rows, mask=rows < end, other=0)
            accumulator *= tl.load(weight_ptr + pairs)[:, None]
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        place = tl.arange(0, BLOCK_M)[:, None] * width + n[None, :]
        mask = (rows < end)[:, None] & (n < width)[None, :]
        out_ptr += start.to(tl.int64) * width
        tl.store(out_ptr + place, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _moe_combine_kernel(part_ptr, row_ptr, y_ptr, T, D, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """y_t = Σ_k part[row of (t, k)], k ascending; a pair without a row adds nothing."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    y = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + t * K + k, mask=t < T, other=-1)
        mask = (row >= 0)[:, None] & (d < D)[None, :]
        y += tl.load(part_ptr + row.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    place = t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=(t < T)[:, None] & (d < D)[None, :])


def descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of rows × columns of a tensor seen as a matrix: all but its last dimension are rows."""
    return TensorDescriptor.from_tensor(t.view(-1, t.shape[-1]), [rows, columns])


def fitting(block: int, width: int) -> int:
    """A narrow matrix takes a narrower tile."""
    return max(16, min(block, triton.next_power_of_2(width)))


def blocks_of(config: Config, width: int) -> dict[str, int]:
    """The constants of a launch."""
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": fitting(config.block_n, width),
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def block_e(experts: int) -> int:
    """Experts as the kernels are compiled for: few variants."""
    return max(16, triton.next_power_of_2(experts))


def addressable(t: Tensor) -> Tensor:
    """Rows that the gathering loads can address: contiguous, and 16 bytes aligned."""
    return t if t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 else t.contiguous()


def moe_up(x: Tensor, w_up: Tensor, plan: Dispatch) -> Tensor:
    """A (T·K, F) = relu(H)², rows sorted by expert."""
    (E, F, D), blocks = w_up.shape, blocks_of(UP, w_up.shape[1])
    a = torch.empty(plan.order.numel(), F, dtype=x.dtype, device=x.device)
    _moe_up_kernel[(plan.tiles * triton.cdiv(F, blocks["BLOCK_N"]),)](
        x,
        descriptor(w_up, blocks["BLOCK_N"], blocks["BLOCK_K"]),
        plan.token,
        plan.offset,
        plan.tile_end,
        a,
        D,
        F,
        E,
        x.stride(0),
        EVEN_D=D % blocks["BLOCK_K"] == 0,
        BLOCK_E=block_e(E),
        **blocks,
    )
    return a


def moe_rows(left: Tensor, w: Tensor, plan: Dispatch, weights: Tensor | None) -> Tensor:
    """Rows (T·K, inner) times each expert's matrix: w (E, width, inner), or with no weights (E, inner, width)."""
    transposed = weights is None
    E, inner, width = w.shape if transposed else (w.shape[0], w.shape[2], w.shape[1])
    blocks = blocks_of(ROWS["long" if inner >= LONG else "short"], width)
    out = torch.empty(left.shape[0], width, dtype=left.dtype, device=left.device)
    box = (blocks["BLOCK_K"], blocks["BLOCK_N"]) if transposed else (blocks["BLOCK_N"], blocks["BLOCK_K"])
    _moe_rows_kernel[(plan.tiles * triton.cdiv(width, blocks["BLOCK_N"]),)](
        descriptor(left, BLOCK_M, blocks["BLOCK_K"]),
        descriptor(w, *box),
        plan.order,
        weights,
        plan.offset,
        plan.tile_end,
        out,
        inner,
        width,
        E,
        TRANSPOSED=transposed,
        WEIGHTED=not transposed,
        BLOCK_E=block_e(E),
        **blocks,
    )
    return out


def moe_combine(parts: Tensor, plan: Dispatch, tokens: int, top_k: int) -> Tensor:
    """(T, D): the sum of each token's K rows of parts (T·K, D)."""
    width = parts.shape[1]
    y = torch.empty(tokens, width, dtype=parts.dtype, device=parts.device)
    block_t, block_d = 4, min(512, triton.next_power_of_2(width))
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(width, block_d))
    _moe_combine_kernel[grid](parts, plan.row, y, tokens, width, K=top_k, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4)
    return y


def moe_triton(
    x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, expert_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """As `moe_reference`, in float16 or bfloat16; D and F are multiples of 16."""
    T, K = expert_ids.shape
    if not T:
        return x.new_empty(x.shape), x.new_empty(0, w_up.shape[1])
    plan = dispatch(expert_ids, w_up.shape[0])
    a = moe_up(addressable(x), w_up.contiguous(), plan)
    parts = moe_rows(a, w_down.contiguous(), plan, expert_weights.contiguous())
    return moe_combine(parts, plan, T, K), a
