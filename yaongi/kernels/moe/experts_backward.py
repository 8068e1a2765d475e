"""The squared-ReLU experts' backward in Triton, over the same sorted rows as experts_forward.py.

dh         gathers dy, writes dH and g·A, and dg in partial sums                           (T·K, D) → (T·K, F)
dw         dW_up = Σ dH ⊗ x and dW_down = Σ dy ⊗ g·A over the rows of each expert          one launch each
dx         rows of W_upᵀ·dH, then combine                                                  (T·K, F) → (T, D)

On an H100 dw that adds to sums is csrc/moe/weight_gradient.cu.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from yaongi.kernels.backend import cuda_launcher
from yaongi.kernels.common.descriptors import descriptor, matrix_descriptor
from yaongi.kernels.common.fp8 import cast8, note_largest
from yaongi.kernels.common.generations import for_gpu
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv
from yaongi.kernels.moe.dispatch import BLOCK_M, Dispatch, dispatch, moe_combine
from yaongi.kernels.moe.grouped_gemm import (
    SMALL,
    Config,
    Fp8,
    block_e,
    find_tile,
    fit_block,
    gathered_expert_dot,
    launch_options,
    moe_grouped_gemm,
)

Tensor = torch.Tensor


@dataclass(frozen=True)
class WeightConfig:
    """Launch options of a weight gradient; its tile: columns of the sorted and the gathered operand, rows per step."""

    block_r: int
    block_g: int
    block_k: int
    num_warps: int
    num_stages: int


# Found on an H100, T 32768, D 2048, E 64, K 6, F 256 to 1024, 2026-11-24 (docs/LAB.md).
DH = {8: SMALL, 9: Config(block_n=256, block_k=64, num_warps=8, num_stages=4), 12: SMALL}
SMALL_DW = WeightConfig(block_r=128, block_g=64, block_k=32, num_warps=8, num_stages=3)
MANY_ROWS = 1024  # of an expert, on average, from which on csrc/moe/weight_gradient.cu is faster with more stages
DW = {8: SMALL_DW, 9: WeightConfig(block_r=256, block_g=128, block_k=64, num_warps=8, num_stages=6), 12: SMALL_DW}


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the left and the right half of a tile, (ROWS, COLUMNS // 2)."""
    return tl.split(tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))


@triton.jit(do_not_specialize_on_alignment=["unit_dy_ptr", "unit_w_ptr", "unit_a_ptr", "scale_ptr", "amax_ptr"])
def _moe_dh_kernel(
    dy_ptr,  # (T, D)
    w_desc,  # (E·D, F), or with FP8 (E·F, D)
    a_desc,  # (T·K, F)
    order_ptr,
    token_ptr,
    weight_ptr,  # (T·K), by pair
    offset_ptr,
    tile_end_ptr,
    dh_ptr,  # (T·K, F)
    ga_ptr,  # (T·K, F)
    dg_ptr,  # (⌈F / BLOCK_N⌉, T·K), by row
    dh8_ptr,  # (T·K, F); with the five below None unless FP8
    unit_dy_ptr,  # (), fp32
    unit_w_ptr,  # (), fp32
    unit_a_ptr,  # (), fp32
    scale_ptr,  # (), fp32: of dH
    amax_ptr,  # (), int32: the bits of a float32
    D,
    F,
    E,
    pairs,
    stride_yt,
    FP8: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Compute dA′ = dy·W_down with dy gathered, dg = ⟨dA′, A⟩, dH = 2·sqrt(A)·g·dA′, and g·A for dW_down.

    With FP8 dH is also cast.
    """
    columns = tl.cdiv(F, BLOCK_N)
    tile, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    expert, start, end = find_tile(offset_ptr, tile_end_ptr, tile, E, BLOCK_M, BLOCK_E)
    if expert < E:
        rows = start + tl.arange(0, BLOCK_M)
        tokens = tl.load(token_ptr + rows, mask=rows < end, other=0)
        dy_rows = dy_ptr + tokens.to(tl.int64)[:, None] * stride_yt
        accumulator = gathered_expert_dot(
            dy_rows, w_desc, expert, column, D, F, TRANSPOSED=not FP8, EVEN=EVEN_D,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        if FP8:
            dh8_ptr += start.to(tl.int64) * F
        pair = tl.load(order_ptr + rows, mask=rows < end, other=0)
        g = tl.load(weight_ptr + pair)[:, None]
        ga_ptr += start.to(tl.int64) * F
        dh_ptr += start.to(tl.int64) * F
        dg = tl.zeros((BLOCK_M,), tl.float32)
        panels = _halves(accumulator, BLOCK_M, BLOCK_N)  # a full tile of A next to the accumulator would spill
        if FP8:  # which has one more result
            panels = _halves(panels[0], BLOCK_M, BLOCK_N // 2) + _halves(panels[1], BLOCK_M, BLOCK_N // 2)
        WIDTH: tl.constexpr = BLOCK_N // (4 if FP8 else 2)
        for panel in tl.static_range(4 if FP8 else 2):
            first = column * BLOCK_N + panel * WIDTH
            n = first + tl.arange(0, WIDTH)
            place = tl.arange(0, BLOCK_M)[:, None] * F + n[None, :]
            mask = (rows < end)[:, None] & (n < F)[None, :]
            act, dact = a_desc.load([start, first]).to(tl.float32), panels[panel]
            if FP8:
                act *= tl.load(unit_a_ptr)
                dact *= tl.load(unit_dy_ptr) * tl.load(unit_w_ptr)
            dg += tl.sum(dact * act, axis=1)
            tl.store(ga_ptr + place, (g * act).to(ga_ptr.dtype.element_ty), mask=mask)
            dh = 2.0 * tl.sqrt(act) * (g * dact)
            tl.store(dh_ptr + place, dh.to(dh_ptr.dtype.element_ty), mask=mask)
            if FP8:
                note_largest(amax_ptr, tl.where(mask, dh, 0.0))
                tl.store(dh8_ptr + place, cast8(dh, tl.load(scale_ptr), dh8_ptr.dtype.element_ty), mask=mask)
        tl.store(dg_ptr + column.to(tl.int64) * pairs + rows, dg, mask=rows < end)


@triton.jit
def _moe_dg_kernel(dg_ptr, row_ptr, out_ptr, pairs, columns, BLOCK: tl.constexpr):
    """Compute dexpert_weights of each pair: the sum of its row's partial sums, in order."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + p, mask=p < pairs, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(columns):
        total += tl.load(dg_ptr + row, mask=row >= 0, other=0.0)
        dg_ptr += pairs
    tl.store(out_ptr + p, total, mask=p < pairs)


@triton.jit
def _moe_dw_kernel(
    row_desc,  # (T·K, R), by row
    gather_ptr,  # (T, G), gathered by token
    token_ptr,
    offset_ptr,
    out_ptr,  # (E, G, R), or (E, R, G)
    sum_desc,  # the same shape in float32, added to; None unless ACCUMULATE
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
    """Compute out[e] = Σ gathered ⊗ row (or row ⊗ gathered) over the rows of expert e; rows past its end are masked.

    With ACCUMULATE, TMA adds the tile to the sum in L2: the old sum would not fit in registers next to the tile.
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


def moe_dh(
    dy: Tensor, w_down: Tensor, a: Tensor, plan: Dispatch, weights: Tensor, fp8: Fp8 | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dH and g·A, (T·K, F), dexpert_weights by pair, (T·K) fp32, and with `fp8` dH cast.

    In FP8 W_down is transposed: (E, F, D).
    """
    E, D, F, pairs = len(w_down), dy.shape[1], a.shape[1], plan.order.numel()
    blocks = launch_options(for_gpu(DH, a), dy, F)
    columns, box = cdiv(F, blocks["BLOCK_N"]), (blocks["BLOCK_K"], blocks["BLOCK_N"])
    dh, ga = (torch.empty(a.shape, dtype=fp8.dtype if fp8 else a.dtype, device=a.device) for _ in range(2))
    dh8 = a.new_empty(a.shape) if fp8 else None
    partial, dweights = (torch.empty(n * pairs, dtype=torch.float32, device=a.device) for n in (columns, 1))
    launcher(_moe_dh_kernel, (plan.tiles * columns,))(
        dy,
        matrix_descriptor(w_down, *(box[::-1] if fp8 else box)),
        matrix_descriptor(a, BLOCK_M, blocks["BLOCK_N"] // (4 if fp8 else 2)),
        plan.order,
        plan.token,
        weights,
        plan.offset,
        plan.tile_end,
        dh,
        ga,
        partial,
        dh8,
        *((fp8.unit, fp8.unit_w, fp8.unit_a, fp8.scale, fp8.amax.view(torch.int32)) if fp8 else (None,) * 5),
        D,
        F,
        E,
        pairs,
        dy.stride(0),
        FP8=fp8 is not None,
        EVEN_D=D % blocks["BLOCK_K"] == 0,
        BLOCK_E=block_e(E),
        **blocks,
    )
    launcher(_moe_dg_kernel, (cdiv(pairs, 1024),))(partial, plan.row, dweights, pairs, columns, BLOCK=1024)
    return dh, ga, dweights, dh8


def moe_dw(
    rows: Tensor, gathered: Tensor, out: Tensor, plan: Dispatch, *, gather_left: bool, accumulate: bool = False
) -> None:
    """Write, or add to out, each expert's Σ gathered ⊗ row, (E, G, R), or Σ row ⊗ gathered, (E, R, G)."""
    R, G, config = rows.shape[1], gathered.shape[1], for_gpu(DW, rows)
    block_r, block_g = fit_block(config.block_r, R), fit_block(config.block_g, G)
    box = (block_g, block_r) if gather_left else (block_r, block_g)
    launcher(_moe_dw_kernel, (out.shape[0] * cdiv(R, block_r) * cdiv(G, block_g),))(
        matrix_descriptor(rows, config.block_k, block_r),
        gathered,
        plan.token,
        plan.offset,
        None if accumulate else out,
        descriptor(out, *box) if accumulate else None,
        R,
        G,
        gathered.stride(0),
        GATHER_LEFT=gather_left,
        ACCUMULATE=accumulate,
        EVEN_G=G % block_g == 0,
        BLOCK_R=block_r,
        BLOCK_G=block_g,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def moe_dw_cuda(rows: Tensor, gathered: Tensor, out: Tensor, plan: Dispatch, *, gather_left: bool) -> None:
    """Add to out what `moe_dw` does."""
    wide = gather_left == (fit_block(256, rows.shape[1]) == 256)  # a tile has 256 columns of rows, else 128
    reduce = len(rows) > MANY_ROWS * len(out)
    cuda_launcher("moe_weight_gradient")(rows, gathered, plan.token, plan.offset, out, gather_left, wide, reduce)


def moe_backward_triton(
    dy: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `moe_backward_reference` does; the dispatch is recomputed rather than saved."""
    make = torch.empty if len(x) else torch.zeros  # without tokens no kernel writes the gradients
    dw_up, dw_down = (make(w.shape, dtype=w.dtype, device=w.device) for w in (w_up, w_down))
    dx, dweights = _backward(moe_dw, dy, x, w_up, w_down, *rest, dw_up, dw_down)
    return dx, dw_up, dw_down, dweights


def moe_backward_accumulate_triton(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what `moe_backward_accumulate_reference` does."""
    return _backward(functools.partial(moe_dw, accumulate=True), *arguments)


def moe_backward_accumulate_cuda(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what `moe_backward_accumulate_reference` does, the weights' gradients in CUDA."""
    return _backward(moe_dw_cuda, *arguments)


def _backward(
    weight_gradient: Callable[..., None],
    dy: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    a: Tensor,
    dw_up: Tensor,
    dw_down: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write, or add to, the weights' gradients; return dx and dexpert_weights."""
    T, K = expert_ids.shape
    if not T:
        return x.new_empty(x.shape), expert_weights.new_empty(T, K)
    plan = dispatch(expert_ids, w_up.shape[0])
    dh, ga, dweights, _ = moe_dh(dy, w_down.contiguous(), a, plan, expert_weights.contiguous())
    weight_gradient(dh, x, dw_up, plan, gather_left=False)
    weight_gradient(ga, dy, dw_down, plan, gather_left=True)
    del ga  # memory peaks with the rows of dx
    dx = moe_combine(moe_grouped_gemm(dh, w_up.contiguous(), plan, None), plan.row, T, K)
    return dx, dweights.view(T, K)
