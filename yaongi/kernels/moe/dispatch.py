"""Dispatch and combine: a counting sort of the routed pairs by expert on the device, and the sum of rows per token.

A tile of BLOCK_M rows never spans two experts. Row tile i finds its expert from the running counts of tiles, so a grid
of ⌈T·K / BLOCK_M⌉ + E row tiles covers any routing, and the host needn't know the routing.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.early_launch import early_launch, let_next_start, wait_for_previous
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv, next_power_of_2

Tensor = torch.Tensor

BLOCK_M = 128  # rows per tile of the experts' products; dispatch counts tiles of this height


@triton.jit
def _moe_dispatch_count_kernel(ids_ptr, count_ptr, pairs, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Count the pairs of each expert in a block of pairs."""
    block = tl.program_id(0)
    p = block * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + p, mask=p < pairs, other=-1)
    e = tl.arange(0, BLOCK_E)
    count = tl.sum((ids[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(count_ptr + block * E + e, count, mask=e < E)


@triton.jit
def _moe_dispatch_offset_kernel(
    count_ptr,  # (blocks, E): counts in, then the first row of each block's pairs
    offset_ptr,  # (E + 1): the first row of each expert, then the end
    tile_end_ptr,  # (E): number of tiles of the experts up to and including this one
    blocks,
    E,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sum the counts over experts, and over blocks within an expert, in one program."""
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, blocks, BLOCK):
        b = first + tl.arange(0, BLOCK)
        mask = (b[:, None] < blocks) & (e[None, :] < E)
        total += tl.sum(tl.load(count_ptr + b[:, None] * E + e[None, :], mask=mask, other=0), axis=0)
    ends = tl.cumsum(total, axis=0)
    tl.store(offset_ptr + 1 + e, ends, mask=e < E)
    tl.store(offset_ptr + e, 0, mask=e == 0)
    tl.store(tile_end_ptr + e, tl.cumsum((total + BLOCK_M - 1) // BLOCK_M, axis=0), mask=e < E)
    running = ends - total
    for first in range(0, blocks, BLOCK):
        b = first + tl.arange(0, BLOCK)
        mask = (b[:, None] < blocks) & (e[None, :] < E)
        counts = tl.load(count_ptr + b[:, None] * E + e[None, :], mask=mask, other=0)
        tl.store(
            count_ptr + b[:, None] * E + e[None, :], running[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask
        )
        running += tl.sum(counts, axis=0)


@triton.jit
def _moe_dispatch_place_kernel(
    ids_ptr, first_ptr, order_ptr, token_ptr, row_ptr, pairs, E, K, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Give every pair its row: stable within a block by a running sum of the one-hot ids."""
    block = tl.program_id(0)
    p = block * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + p, mask=p < pairs, other=-1)
    e = tl.arange(0, BLOCK_E)
    one_hot = (ids[:, None] == e[None, :]).to(tl.int32)
    first = tl.load(first_ptr + block * E + e, mask=e < E, other=0)
    row = tl.sum(one_hot * (first[None, :] + tl.cumsum(one_hot, axis=0) - 1), axis=1)
    valid = (ids >= 0) & (ids < E)
    tl.store(order_ptr + row, p, mask=valid & (p < pairs))
    tl.store(token_ptr + row, p // K, mask=valid & (p < pairs))
    tl.store(row_ptr + p, tl.where(valid, row, -1), mask=p < pairs)


@dataclass(frozen=True)
class Dispatch:
    """The routed pairs sorted by expert: permutation, inverse, and row ranges."""

    order: Tensor  # (T·K) int32: the pair of each row
    token: Tensor  # (T·K) int32: the token of each row
    row: Tensor  # (T·K) int32: the row of each pair, −1 for a pair with a bad id
    offset: Tensor  # (E + 1) int32: first row of each expert
    tile_end: Tensor  # (E) int32: tiles of BLOCK_M rows up to and including each expert
    tiles: int  # an upper bound on the number of tiles


def dispatch(expert_ids: Tensor, experts: int) -> Dispatch:
    """Sort the pairs of expert_ids (T, K) by expert, stably, on the device."""
    pairs, top_k = expert_ids.numel(), expert_ids.shape[1]
    block_e = next_power_of_2(experts)
    block = max(16, min(512, 16384 // block_e))
    blocks = cdiv(pairs, block)
    ids = expert_ids.contiguous()
    count, order, token, row, offset, tile_end = (
        ids.new_empty(n) for n in (blocks * experts, pairs, pairs, pairs, experts + 1, experts)
    )
    launcher(_moe_dispatch_count_kernel, (blocks,))(
        ids, count, pairs, experts, BLOCK=block, BLOCK_E=block_e, num_warps=8
    )
    launcher(_moe_dispatch_offset_kernel, (1,))(
        count, offset, tile_end, blocks, experts, BLOCK_M=BLOCK_M, BLOCK=8192 // block_e, BLOCK_E=block_e, num_warps=8
    )
    launcher(_moe_dispatch_place_kernel, (blocks,))(
        ids, count, order, token, row, pairs, experts, top_k, BLOCK=block, BLOCK_E=block_e, num_warps=8
    )
    return Dispatch(order, token, row, offset, tile_end, cdiv(pairs, BLOCK_M) + experts)


@triton.jit
def _moe_combine_kernel(
    part_ptr,  # (T·K, D)
    row_ptr,  # (T·K)
    addend_ptr,  # (T, D), or None
    y_ptr,  # (T, D)
    T,
    D,
    stride_at,
    K: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute y_t = Σ_k part[row of (t, k)] + addend_t, k ascending; a pair without a row adds nothing."""
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    y = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + t * K + k, mask=t < T, other=-1)
        mask = (row >= 0)[:, None] & (d < D)[None, :]
        y += tl.load(part_ptr + row.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    inside, t = (t < T)[:, None] & (d < D)[None, :], t.to(tl.int64)[:, None]
    if HAS_ADDEND:
        y += tl.load(addend_ptr + t * stride_at + d[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * D + d[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def moe_combine(
    parts: Tensor, row: Tensor, tokens: int, top_k: int, addend: Tensor | None = None, *, early: bool = False
) -> Tensor:
    """Return the sum of each token's K rows of parts (T·K, D), and of `addend` (T, D), as (T, D).

    Args:
        row: (T·K) int32, the row of each pair, −1 for none.
        early: launch early, see common/early_launch.py.
    """
    width = parts.shape[1]
    y = torch.empty(tokens, width, dtype=parts.dtype, device=parts.device)
    block_t, block_d = 4, min(512, next_power_of_2(width))
    grid = (cdiv(tokens, block_t), cdiv(width, block_d))
    launcher(_moe_combine_kernel, grid)(
        parts,
        row,
        addend,
        y,
        tokens,
        width,
        0 if addend is None else addend.stride(0),
        K=top_k,
        HAS_ADDEND=addend is not None,
        **(early_launch(parts) if early else {"EARLY": False}),
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return y
