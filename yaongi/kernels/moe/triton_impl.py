"""The squared-ReLU experts in Triton: a chain of fused stages over rows sorted by expert, without host synchronisation.

    dispatch   counting sort of the routed pairs: rows by expert, and their inverse            3 launches
    up         gathers x in the load of its operand, writes A = relu(H)²                       (T·K, D) → (T·K, F)
    down       multiplies by the expert weight in the accumulator, writes rows                 (T·K, F) → (T·K, D)
    combine    y_t = Σ_k of the token's rows, in order                                         (T·K, D) → (T, D)
    dh         gathers dy, writes dH and g·A, and dg in partial sums                           (T·K, D) → (T·K, F)
    dw         dW_up = Σ dH ⊗ x and dW_down = Σ dy ⊗ g·A over the rows of each expert          one launch each
    dx         rows of W_upᵀ·dH, then combine                                                  (T·K, F) → (T, D)

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


@dataclass(frozen=True)
class WeightConfig:
    """The tile of a weight's gradient (of the side by row × the gathered side), its inner rows, and how it is run."""

    block_r: int
    block_g: int
    block_k: int
    num_warps: int
    num_stages: int


# Found on an H100, T 32768, D 2048, E 64, K 6, F 256 to 1024, 2026-11-24 (docs/LAB.md). A row tile is BLOCK_M × block_n
UP = Config(block_n=256, block_k=64, num_warps=8, num_stages=4)
DH = Config(block_n=256, block_k=64, num_warps=8, num_stages=4)
ROWS = {  # by the inner dimension: when it is short, two small tiles at a time hide each other's first and last steps
    "short": Config(block_n=128, block_k=64, num_warps=4, num_stages=3),
    "long": Config(block_n=256, block_k=64, num_warps=8, num_stages=3),
}
LONG = 1024
DW = WeightConfig(block_r=256, block_g=128, block_k=64, num_warps=8, num_stages=6)


@triton.jit
def _find_tile(offset_ptr, tile_end_ptr, tile, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert of a row tile (E when there is none), its first row, and the expert's end."""
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(tile_end_ptr + e, mask=e < E, other=2147483647)
    expert = tl.sum((ends <= tile).to(tl.int32))
    before = tl.max(tl.where(ends <= tile, ends, 0))
    known = tl.minimum(expert, E - 1)
    start = tl.load(offset_ptr + known) + (tile - before) * BLOCK_M
    return expert, start, tl.load(offset_ptr + known + 1)


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
    expert, start, end = _find_tile(offset_ptr, tile_end_ptr, tile, E, BLOCK_M, BLOCK_E)
    if expert < E:
        rows = start + tl.arange(0, BLOCK_M)
        tokens = tl.load(token_ptr + rows, mask=rows < end, other=0)
        x_rows = x_ptr + tokens.to(tl.int64)[:, None] * stride_xt
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            d = k + tl.arange(0, BLOCK_K)[None, :]
            x = tl.load(x_rows + d) if EVEN_D else tl.load(x_rows + d, mask=d < D, other=0.0)
            w = w_desc.load([expert * F + column * BLOCK_N, k])  # (BLOCK_N, BLOCK_K)
            accumulator = tl.dot(x, w.T, accumulator)
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
    expert, start, end = _find_tile(offset_ptr, tile_end_ptr, tile, E, BLOCK_M, BLOCK_E)
    if expert < E:
        rows = start + tl.arange(0, BLOCK_M)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, inner, BLOCK_K):
            left = left_desc.load([start, k])
            if TRANSPOSED:
                w = w_desc.load([expert * inner + k, column * BLOCK_N])  # (BLOCK_K, BLOCK_N)
                accumulator = tl.dot(left, w, accumulator)
            else:
                w = w_desc.load([expert * width + column * BLOCK_N, k])  # (BLOCK_N, BLOCK_K)
                accumulator = tl.dot(left, w.T, accumulator)
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


@triton.jit
def _moe_dh_kernel(
    dy_ptr,  # (T, D)
    w_desc,  # (E·D, F)
    a_desc,  # (T·K, F)
    order_ptr,
    token_ptr,
    weight_ptr,  # (T·K), by pair
    offset_ptr,
    tile_end_ptr,
    dh_ptr,  # (T·K, F)
    ga_ptr,  # (T·K, F)
    dg_ptr,  # (⌈F / BLOCK_N⌉, T·K), by row
    D,
    F,
    E,
    pairs,
    stride_yt,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dA′ = dy·W_down with dy gathered; then dg = ⟨dA′, A⟩, dH = 2·sqrt(A)·g·dA′, and g·A for the weight's gradient."""
    columns = tl.cdiv(F, BLOCK_N)
    tile, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    expert, start, end = _find_tile(offset_ptr, tile_end_ptr, tile, E, BLOCK_M, BLOCK_E)
    if expert < E:
        rows = start + tl.arange(0, BLOCK_M)
        dy_rows = dy_ptr + tl.load(token_ptr + rows, mask=rows < end, other=0).to(tl.int64)[:, None] * stride_yt
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            d = k + tl.arange(0, BLOCK_K)[None, :]
            dy = tl.load(dy_rows + d) if EVEN_D else tl.load(dy_rows + d, mask=d < D, other=0.0)
            w = w_desc.load([expert * D + k, column * BLOCK_N])  # (BLOCK_K, BLOCK_N)
            accumulator = tl.dot(dy, w, accumulator)
        pair = tl.load(order_ptr + rows, mask=rows < end, other=0)
        g = tl.load(weight_ptr + pair)[:, None]
        ga_ptr += start.to(tl.int64) * F
        dh_ptr += start.to(tl.int64) * F
        halves = tl.split(accumulator.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
        dg = tl.zeros((BLOCK_M,), tl.float32)
        for half in tl.static_range(2):  # by halves: all of A beside the accumulator would spill
            n = column * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            place = tl.arange(0, BLOCK_M)[:, None] * F + n[None, :]
            mask = (rows < end)[:, None] & (n < F)[None, :]
            act = a_desc.load([start, column * BLOCK_N + half * (BLOCK_N // 2)]).to(tl.float32)
            dg += tl.sum(halves[half] * act, axis=1)
            tl.store(ga_ptr + place, (g * act).to(ga_ptr.dtype.element_ty), mask=mask)
            dh = 2.0 * tl.sqrt(act) * (g * halves[half])
            tl.store(dh_ptr + place, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        tl.store(dg_ptr + column.to(tl.int64) * pairs + rows, dg, mask=rows < end)


@triton.jit
def _moe_dg_kernel(dg_ptr, row_ptr, out_ptr, pairs, columns, BLOCK: tl.constexpr):
    """dexpert_weights of each pair: the sum of its row's partial sums, in order."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + p, mask=p < pairs, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    for column in range(columns):
        total += tl.load(dg_ptr + column.to(tl.int64) * pairs + row, mask=row >= 0, other=0.0)
    tl.store(out_ptr + p, total, mask=p < pairs)


@triton.jit
def _moe_dw_kernel(
    row_desc,  # (T·K, R), by row
    gather_ptr,  # (T, G), gathered by token
    token_ptr,
    offset_ptr,
    out_ptr,  # (E, G, R), or (E, R, G)
    sum_desc,  # the same in float32, to which is added; else None
    R,
    G,
    stride_g,
    GATHER_LEFT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    EVEN_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[e] = Σ over the rows of e of gathered ⊗ row (or row ⊗ gathered); rows past the expert's end are masked.

    To add, the tile leaves by the copy engine, which adds in L2: read into registers, the old one would not fit there.
    """
    tiles_r, tiles_g = tl.cdiv(R, BLOCK_R), tl.cdiv(G, BLOCK_G)
    expert = tl.program_id(0) // (tiles_r * tiles_g)
    tile = tl.program_id(0) % (tiles_r * tiles_g)
    first_r = (tile % tiles_r) * BLOCK_R
    g = (tile // tiles_r) * BLOCK_G + tl.arange(0, BLOCK_G)
    k = tl.arange(0, BLOCK_K)
    start, end = tl.load(offset_ptr + expert), tl.load(offset_ptr + expert + 1)
    full = end - (end - start) % BLOCK_K
    accumulator = tl.zeros((BLOCK_G, BLOCK_R) if GATHER_LEFT else (BLOCK_R, BLOCK_G), tl.float32)
    for r in range(start, full, BLOCK_K):
        place = gather_ptr + tl.load(token_ptr + r + k).to(tl.int64)[:, None] * stride_g + g[None, :]
        gathered = tl.load(place) if EVEN_G else tl.load(place, mask=(g < G)[None, :], other=0.0)
        rows = row_desc.load([r, first_r])
        if GATHER_LEFT:
            accumulator = tl.dot(gathered.T, rows, accumulator)
        else:
            accumulator = tl.dot(rows.T, gathered, accumulator)
    if full < end:
        inside = full + k < end
        tokens = tl.load(token_ptr + full + k, mask=inside, other=0)
        place = gather_ptr + tokens.to(tl.int64)[:, None] * stride_g + g[None, :]
        gathered = tl.load(place, mask=inside[:, None] & (g < G)[None, :], other=0.0)
        rows = tl.where(inside[:, None], row_desc.load([full, first_r]), 0.0)
        if GATHER_LEFT:
            accumulator = tl.dot(gathered.T, rows, accumulator)
        else:
            accumulator = tl.dot(rows.T, gathered, accumulator)
    if ACCUMULATE:
        if start < end:
            first_g = (tile // tiles_r) * BLOCK_G
            if GATHER_LEFT:
                sum_desc.atomic_add([expert, first_g, first_r], accumulator.reshape(1, BLOCK_G, BLOCK_R))
            else:
                sum_desc.atomic_add([expert, first_r, first_g], accumulator.reshape(1, BLOCK_R, BLOCK_G))
    else:
        n = first_r + tl.arange(0, BLOCK_R)
        place, mask = (g[:, None] * R + n[None, :], (g < G)[:, None] & (n < R)[None, :])
        if not GATHER_LEFT:
            place, mask = (n[:, None] * G + g[None, :], (n < R)[:, None] & (g < G)[None, :])
        out_ptr += expert.to(tl.int64) * R * G
        tl.store(out_ptr + place, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


def _descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of rows × columns of a tensor seen as a matrix: all but its last dimension are rows."""
    return TensorDescriptor.from_tensor(t.view(-1, t.shape[-1]), [rows, columns])


def _fitting(block: int, width: int) -> int:
    """A narrow matrix takes a narrower tile."""
    return max(16, min(block, triton.next_power_of_2(width)))


def _blocks(config: Config, width: int) -> dict[str, int]:
    """The constants of a launch."""
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": _fitting(config.block_n, width),
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _block_e(experts: int) -> int:
    return max(16, triton.next_power_of_2(experts))  # few variants to compile


def _addressable(t: Tensor) -> Tensor:
    """Rows that the gathering loads can address: contiguous, and 16 bytes aligned."""
    return t if t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 else t.contiguous()


def moe_up(x: Tensor, w_up: Tensor, plan: Dispatch) -> Tensor:
    """A (T·K, F) = relu(H)², rows sorted by expert."""
    (E, F, D), blocks = w_up.shape, _blocks(UP, w_up.shape[1])
    a = torch.empty(plan.order.numel(), F, dtype=x.dtype, device=x.device)
    _moe_up_kernel[(plan.tiles * triton.cdiv(F, blocks["BLOCK_N"]),)](
        x,
        _descriptor(w_up, blocks["BLOCK_N"], blocks["BLOCK_K"]),
        plan.token,
        plan.offset,
        plan.tile_end,
        a,
        D,
        F,
        E,
        x.stride(0),
        EVEN_D=D % blocks["BLOCK_K"] == 0,
        BLOCK_E=_block_e(E),
        **blocks,
    )
    return a


def moe_rows(left: Tensor, w: Tensor, plan: Dispatch, weights: Tensor | None) -> Tensor:
    """Rows (T·K, inner) times each expert's matrix: w (E, width, inner), or with no weights (E, inner, width)."""
    transposed = weights is None
    E, inner, width = w.shape if transposed else (w.shape[0], w.shape[2], w.shape[1])
    blocks = _blocks(ROWS["long" if inner >= LONG else "short"], width)
    out = torch.empty(left.shape[0], width, dtype=left.dtype, device=left.device)
    box = (blocks["BLOCK_K"], blocks["BLOCK_N"]) if transposed else (blocks["BLOCK_N"], blocks["BLOCK_K"])
    _moe_rows_kernel[(plan.tiles * triton.cdiv(width, blocks["BLOCK_N"]),)](
        _descriptor(left, BLOCK_M, blocks["BLOCK_K"]),
        _descriptor(w, *box),
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
        BLOCK_E=_block_e(E),
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


def moe_dh(dy: Tensor, w_down: Tensor, a: Tensor, plan: Dispatch, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dH and g·A (T·K, F), and dexpert_weights by pair (T·K) fp32."""
    (E, D, F), blocks, pairs = w_down.shape, _blocks(DH, w_down.shape[2]), plan.order.numel()
    columns = triton.cdiv(F, blocks["BLOCK_N"])
    dh, ga = torch.empty_like(a), torch.empty_like(a)
    partial, dweights = (torch.empty(n * pairs, dtype=torch.float32, device=a.device) for n in (columns, 1))
    _moe_dh_kernel[(plan.tiles * columns,)](
        dy,
        _descriptor(w_down, blocks["BLOCK_K"], blocks["BLOCK_N"]),
        _descriptor(a, BLOCK_M, blocks["BLOCK_N"] // 2),
        plan.order,
        plan.token,
        weights,
        plan.offset,
        plan.tile_end,
        dh,
        ga,
        partial,
        D,
        F,
        E,
        pairs,
        dy.stride(0),
        EVEN_D=D % blocks["BLOCK_K"] == 0,
        BLOCK_E=_block_e(E),
        **blocks,
    )
    _moe_dg_kernel[(triton.cdiv(pairs, 1024),)](partial, plan.row, dweights, pairs, columns, BLOCK=1024)
    return dh, ga, dweights


def moe_dw(
    rows: Tensor, gathered: Tensor, out: Tensor, plan: Dispatch, *, gather_left: bool, accumulate: bool = False
) -> None:
    """out = Σ, or out += Σ, over each expert's rows of gathered ⊗ row (E, G, R), or of row ⊗ gathered (E, R, G)."""
    R, G = rows.shape[1], gathered.shape[1]
    block_r, block_g = _fitting(DW.block_r, R), _fitting(DW.block_g, G)
    box = [1, block_g, block_r] if gather_left else [1, block_r, block_g]
    _moe_dw_kernel[(out.shape[0] * triton.cdiv(R, block_r) * triton.cdiv(G, block_g),)](
        _descriptor(rows, DW.block_k, block_r),
        gathered,
        plan.token,
        plan.offset,
        None if accumulate else out,
        TensorDescriptor.from_tensor(out, box) if accumulate else None,
        R,
        G,
        gathered.stride(0),
        GATHER_LEFT=gather_left,
        ACCUMULATE=accumulate,
        EVEN_G=G % block_g == 0,
        BLOCK_R=block_r,
        BLOCK_G=block_g,
        BLOCK_K=DW.block_k,
        num_warps=DW.num_warps,
        num_stages=DW.num_stages,
    )


def moe_triton(
    x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, expert_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """As `moe_reference`, in float16 or bfloat16; D and F are multiples of 16."""
    T, K = expert_ids.shape
    if not T:
        return x.new_empty(x.shape), x.new_empty(0, w_up.shape[1])
    plan = dispatch(expert_ids, w_up.shape[0])
    a = moe_up(_addressable(x), w_up.contiguous(), plan)
    parts = moe_rows(a, w_down.contiguous(), plan, expert_weights.contiguous())
    return moe_combine(parts, plan, T, K), a


def moe_backward_triton(
    dy: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `moe_backward_reference`; the dispatch is computed again rather than saved."""
    make = torch.empty if len(x) else torch.zeros  # without tokens no kernel writes them
    dw_up, dw_down = (make(w.shape, dtype=w.dtype, device=w.device) for w in (w_up, w_down))
    dx, dweights = _backward(dy, x, w_up, w_down, *rest, dw_up, dw_down, accumulate=False)
    return dx, dw_up, dw_down, dweights


def moe_backward_accumulate_triton(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """As `moe_backward_accumulate_reference`."""
    return _backward(*arguments, accumulate=True)


def _backward(
    dy: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    a: Tensor,
    dw_up: Tensor,
    dw_down: Tensor,
    *,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """Fills, or adds to, the weights' gradients; returns dx and dexpert_weights."""
    T, K = expert_ids.shape
    if not T:
        return x.new_empty(x.shape), expert_weights.new_empty(T, K)
    plan = dispatch(expert_ids, w_up.shape[0])
    x, dy = _addressable(x), _addressable(dy)
    dh, ga, dweights = moe_dh(dy, w_down.contiguous(), a, plan, expert_weights.contiguous())
    moe_dw(dh, x, dw_up, plan, gather_left=False, accumulate=accumulate)
    moe_dw(ga, dy, dw_down, plan, gather_left=True, accumulate=accumulate)
    del ga  # the rows of dx are the peak of the step
    dx = moe_combine(moe_rows(dh, w_up.contiguous(), plan, None), plan, T, K)
    return dx, dweights.view(T, K)
