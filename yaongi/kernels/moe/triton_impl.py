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


# Found on an H100, T 32768, D 2048, F 512, E 64, K 6, 2026-11-24 (docs/LAB.md); a row tile is BLOCK_M × block_n.
UP = Config(block_n=256, block_k=64, num_warps=8, num_stages=3)
DOWN = Config(block_n=128, block_k=64, num_warps=4, num_stages=3)
DH = Config(block_n=128, block_k=64, num_warps=8, num_stages=4)
DX = Config(block_n=128, block_k=64, num_warps=4, num_stages=3)
DW_UP = Config(block_n=128, block_k=64, num_warps=8, num_stages=6)
DW_DOWN = Config(block_n=256, block_k=64, num_warps=8, num_stages=5)


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
    order_ptr,
    offset_ptr,
    tile_end_ptr,
    a_ptr,  # (T·K, F)
    D,
    F,
    E,
    stride_xt,
    K,
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
        tokens = tl.load(order_ptr + rows, mask=rows < end, other=0) // K
        x_rows = x_ptr + tokens.to(tl.int64)[:, None] * stride_xt
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            d = k + tl.arange(0, BLOCK_K)[None, :]
            x = tl.load(x_rows + d) if EVEN_D else tl.load(x_rows + d, mask=d < D, other=0.0)
            w = w_desc.load([expert * F + column * BLOCK_N, k])  # (BLOCK_N, BLOCK_K)
            accumulator = tl.dot(x, w.T, accumulator)
        hidden = tl.maximum(accumulator, 0.0)
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
    K,
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
        pair = tl.load(order_ptr + rows, mask=rows < end, other=0)
        dy_rows = dy_ptr + (pair // K).to(tl.int64)[:, None] * stride_yt
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            d = k + tl.arange(0, BLOCK_K)[None, :]
            dy = tl.load(dy_rows + d) if EVEN_D else tl.load(dy_rows + d, mask=d < D, other=0.0)
            w = w_desc.load([expert * D + k, column * BLOCK_N])  # (BLOCK_K, BLOCK_N)
            accumulator = tl.dot(dy, w, accumulator)
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        place = tl.arange(0, BLOCK_M)[:, None] * F + n[None, :]
        mask = (rows < end)[:, None] & (n < F)[None, :]
        first = start.to(tl.int64) * F
        act = a_desc.load([start, column * BLOCK_N]).to(tl.float32)
        tl.store(dg_ptr + column.to(tl.int64) * pairs + rows, tl.sum(accumulator * act, axis=1), mask=rows < end)
        g = tl.load(weight_ptr + pair)[:, None]
        tl.store(ga_ptr + first + place, (g * act).to(ga_ptr.dtype.element_ty), mask=mask)
        dh = 2.0 * tl.sqrt(act) * (g * accumulator)
        tl.store(dh_ptr + first + place, dh.to(dh_ptr.dtype.element_ty), mask=mask)


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
    left_ptr,  # (T·K, M) by row, or (T, M) gathered
    right_ptr,  # (T·K, N) by row, or (T, N) gathered
    order_ptr,
    offset_ptr,
    out_ptr,  # (E, M, N)
    M,
    N,
    stride_l,
    stride_r,
    K,
    GATHER_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[e] = Σ over the rows of e of left ⊗ right, one side by row and the other gathered by token."""
    rows_m, columns_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (rows_m * columns_n)
    tile = tl.program_id(0) % (rows_m * columns_n)
    m = (tile // columns_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % columns_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, end = tl.load(offset_ptr + expert), tl.load(offset_ptr + expert + 1)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(start, end, BLOCK_K):
        rows = r + tl.arange(0, BLOCK_K)
        inside = rows < end
        tokens = tl.load(order_ptr + rows, mask=inside, other=0) // K
        left_rows, right_rows = (tokens, rows) if GATHER_LEFT else (rows, tokens)
        left_place = left_rows.to(tl.int64)[:, None] * stride_l + m[None, :]
        right_place = right_rows.to(tl.int64)[:, None] * stride_r + n[None, :]
        left = tl.load(left_ptr + left_place, mask=inside[:, None] & (m < M)[None, :], other=0.0)
        right = tl.load(right_ptr + right_place, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        accumulator = tl.dot(left.T, right, accumulator)
    place = m[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    out_ptr += expert.to(tl.int64) * M * N
    tl.store(out_ptr + place, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


def _descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of rows × columns of a tensor seen as a matrix: all but its last dimension are rows."""
    return TensorDescriptor.from_tensor(t.view(-1, t.shape[-1]), [rows, columns])


def _blocks(config: Config, width: int) -> dict[str, int]:
    """The constants of a launch; a narrow matrix takes a narrower tile."""
    block_n = max(16, min(config.block_n, triton.next_power_of_2(width)))
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _block_e(experts: int) -> int:
    return max(16, triton.next_power_of_2(experts))  # few variants to compile


def _addressable(t: Tensor) -> Tensor:
    """Rows that the gathering loads can address: contiguous, and 16 bytes aligned."""
    return t if t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 else t.contiguous()


def moe_up(x: Tensor, w_up: Tensor, plan: Dispatch, top_k: int) -> Tensor:
    """A (T·K, F) = relu(H)², rows sorted by expert."""
    (E, F, D), blocks = w_up.shape, _blocks(UP, w_up.shape[1])
    a = torch.empty(plan.order.numel(), F, dtype=x.dtype, device=x.device)
    _moe_up_kernel[(plan.tiles * triton.cdiv(F, blocks["BLOCK_N"]),)](
        x,
        _descriptor(w_up, blocks["BLOCK_N"], blocks["BLOCK_K"]),
        plan.order,
        plan.offset,
        plan.tile_end,
        a,
        D,
        F,
        E,
        x.stride(0),
        K=top_k,
        EVEN_D=D % blocks["BLOCK_K"] == 0,
        BLOCK_E=_block_e(E),
        **blocks,
    )
    return a


def moe_rows(left: Tensor, w: Tensor, plan: Dispatch, weights: Tensor | None, config: Config) -> Tensor:
    """Rows (T·K, inner) times each expert's matrix: w (E, width, inner), or with no weights (E, inner, width)."""
    transposed = weights is None
    E, inner, width = w.shape if transposed else (w.shape[0], w.shape[2], w.shape[1])
    blocks = _blocks(config, width)
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
        _descriptor(a, BLOCK_M, blocks["BLOCK_N"]),
        plan.order,
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
        K=pairs // dy.shape[0],
        EVEN_D=D % blocks["BLOCK_K"] == 0,
        BLOCK_E=_block_e(E),
        **blocks,
    )
    _moe_dg_kernel[(triton.cdiv(pairs, 1024),)](partial, plan.row, dweights, pairs, columns, BLOCK=1024)
    return dh, ga, dweights


def moe_dw(left: Tensor, right: Tensor, like: Tensor, plan: Dispatch, top_k: int, *, gather_left: bool) -> Tensor:
    """(E, M, N) in the weight's dtype: Σ over each expert's rows of left ⊗ right; the gathered side is by token."""
    (E, M, N), blocks = like.shape, _blocks(DW_DOWN if gather_left else DW_UP, like.shape[2])
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    _moe_dw_kernel[(E * triton.cdiv(M, BLOCK_M) * triton.cdiv(N, blocks["BLOCK_N"]),)](
        left,
        right,
        plan.order,
        plan.offset,
        out,
        M,
        N,
        left.stride(0),
        right.stride(0),
        K=top_k,
        GATHER_LEFT=gather_left,
        **blocks,
    )
    return out


def moe_triton(
    x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, expert_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """As `moe_reference`, in float16 or bfloat16; D and F are multiples of 16."""
    T, K = expert_ids.shape
    if not T:
        return x.new_empty(x.shape), x.new_empty(0, w_up.shape[1])
    plan = dispatch(expert_ids, w_up.shape[0])
    a = moe_up(_addressable(x), w_up.contiguous(), plan, K)
    parts = moe_rows(a, w_down.contiguous(), plan, expert_weights.contiguous(), DOWN)
    return moe_combine(parts, plan, T, K), a


def moe_backward_triton(
    dy: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, expert_weights: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `moe_backward_reference`; the dispatch is computed again rather than saved."""
    T, K = expert_ids.shape
    if not T:
        return x.new_empty(x.shape), torch.zeros_like(w_up), torch.zeros_like(w_down), expert_weights.new_empty(T, K)
    plan = dispatch(expert_ids, w_up.shape[0])
    x, dy = _addressable(x), _addressable(dy)
    dh, ga, dweights = moe_dh(dy, w_down.contiguous(), a, plan, expert_weights.contiguous())
    dw_up = moe_dw(dh, x, w_up, plan, K, gather_left=False)
    dw_down = moe_dw(dy, ga, w_down, plan, K, gather_left=True)
    dx = moe_combine(moe_rows(dh, w_up.contiguous(), plan, None, DX), plan, T, K)
    return dx, dw_up, dw_down, dweights.view(T, K)
