"""Routing and dispatch in Triton: the experts of each token, and the routed pairs sorted by expert."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor
BLOCK_M = 128  # rows of a tile of the experts' products: dispatch counts tiles of this height
EPSILON = tl.constexpr(1e-20)  # keeps the weights finite when every chosen score is zero


@triton.jit
def _moe_route_kernel(
    logits_ptr,  # (T, E)
    bias_ptr,  # (E)
    ids_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    load_ptr,  # (E), zeros in
    T,
    E,
    scale,
    stride_t,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """K times the largest score + bias, ties to the lowest index; weights from the scores alone."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k_index = tl.arange(0, BLOCK_K)
    known = (t < T)[:, None] & (e < E)[None, :]
    scores = tl.sigmoid(tl.load(logits_ptr + t.to(tl.int64)[:, None] * stride_t + e[None, :], mask=known, other=0.0))
    bias = tl.load(bias_ptr + e, mask=e < E, other=0.0)
    ranked = tl.where((e < E)[None, :], scores + bias[None, :], float("-inf"))
    ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    taken = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for k in tl.static_range(K):
        best = tl.argmax(ranked, axis=1, tie_break_left=True)
        here = e[None, :] == best[:, None]
        ids = tl.where(k_index[None, :] == k, best[:, None], ids)
        chosen = tl.where(k_index[None, :] == k, tl.sum(tl.where(here, scores, 0.0), axis=1)[:, None], chosen)
        taken += here.to(tl.int32)
        ranked = tl.where(here, float("-inf"), ranked)
    weights = scale * (chosen / (tl.sum(chosen, axis=1) + EPSILON)[:, None])
    place = t.to(tl.int64)[:, None] * K + k_index[None, :]
    stored = (t < T)[:, None] & (k_index < K)[None, :]
    tl.store(ids_ptr + place, ids, mask=stored)
    tl.store(weights_ptr + place, weights, mask=stored)
    tl.atomic_add(load_ptr + e, tl.sum(tl.where((t < T)[:, None], taken, 0), axis=0), mask=e < E, sem="relaxed")


@triton.jit
def _moe_route_backward_kernel(
    dweights_ptr,  # (T, K)
    logits_ptr,  # (T, E)
    ids_ptr,  # (T, K)
    dlogits_ptr,  # (T, E)
    T,
    E,
    scale,
    stride_t,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dlogit = scale·p·(1 − σ)·(dg − Σ p·dg) at the chosen experts, zero elsewhere."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k_index = tl.arange(0, BLOCK_K)
    mask = (t < T)[:, None] & (k_index < K)[None, :]
    place = t.to(tl.int64)[:, None] * K + k_index[None, :]
    ids = tl.load(ids_ptr + place, mask=mask, other=0)
    dweights = tl.load(dweights_ptr + place, mask=mask, other=0.0)
    logits = tl.load(logits_ptr + t.to(tl.int64)[:, None] * stride_t + ids, mask=mask, other=0.0)
    scores = tl.where(mask, tl.sigmoid(logits), 0.0)
    share = scores / (tl.sum(scores, axis=1) + EPSILON)[:, None]
    mean = tl.sum(share * dweights, axis=1)[:, None]
    dchosen = scale * share * (dweights - mean) * tl.sigmoid(-logits)
    dlogits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for k in tl.static_range(K):
        this = k_index[None, :] == k
        expert = tl.sum(tl.where(this, ids, 0), axis=1)[:, None]
        dlogits = tl.where(e[None, :] == expert, tl.sum(tl.where(this, dchosen, 0.0), axis=1)[:, None], dlogits)
    known = (t < T)[:, None] & (e < E)[None, :]
    tl.store(dlogits_ptr + t.to(tl.int64)[:, None] * E + e[None, :], dlogits, mask=known)


def _route_blocks(experts: int, top_k: int) -> dict[str, int]:
    return {
        "K": top_k,
        "BLOCK_T": 16,
        "BLOCK_E": triton.next_power_of_2(experts),
        "BLOCK_K": triton.next_power_of_2(top_k),
        "num_warps": 4,
    }


def moe_route_triton(logits: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `moe_route_reference`, in float32."""
    T, E = logits.shape
    ids = torch.empty(T, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(T, top_k, dtype=torch.float32, device=logits.device)
    load = torch.zeros(E, dtype=torch.int32, device=logits.device)
    if T:
        logits, blocks = _unit_stride(logits), _route_blocks(E, top_k)
        grid = (triton.cdiv(T, blocks["BLOCK_T"]),)
        _moe_route_kernel[grid](logits, bias.contiguous(), ids, weights, load, T, E, scale, logits.stride(0), **blocks)
    return ids, weights, load


def moe_route_backward_triton(dweights: Tensor, logits: Tensor, expert_ids: Tensor, scale: float) -> Tensor:
    """As `moe_route_backward_reference`, in float32."""
    (T, E), top_k = logits.shape, expert_ids.shape[1]
    dlogits = torch.empty(T, E, dtype=torch.float32, device=logits.device)
    if T:
        logits, blocks = _unit_stride(logits), _route_blocks(E, top_k)
        grid = (triton.cdiv(T, blocks["BLOCK_T"]),)
        inputs = (dweights.contiguous(), logits, expert_ids.contiguous(), dlogits)
        _moe_route_backward_kernel[grid](*inputs, T, E, scale, logits.stride(0), **blocks)
    return dlogits


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


@triton.jit
def _count_kernel(ids_ptr, count_ptr, pairs, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """How many of a block's pairs each expert has."""
    block = tl.program_id(0)
    p = block * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + p, mask=p < pairs, other=-1)
    e = tl.arange(0, BLOCK_E)
    count = tl.sum((ids[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(count_ptr + block * E + e, count, mask=e < E)


@triton.jit
def _offset_kernel(
    count_ptr,  # (blocks, E): counts in, then the first row of each block's pairs
    offset_ptr,  # (E + 1): the first row of each expert, then the end
    tile_end_ptr,  # (E): tiles of the experts up to and with this one
    blocks,
    E,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: running sums of the counts over experts, and over blocks within an expert."""
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
def _place_kernel(
    ids_ptr, first_ptr, order_ptr, token_ptr, row_ptr, pairs, E, K, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Gives every pair its row: stable within a block by a running sum of the one-hot ids."""
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
    """Where the routed pairs lie when sorted by expert."""

    order: Tensor  # (T·K) int32: the pair of each row
    token: Tensor  # (T·K) int32: the token of each row
    row: Tensor  # (T·K) int32: the row of each pair, −1 for one with a bad id
    offset: Tensor  # (E + 1) int32: first row of each expert
    tile_end: Tensor  # (E) int32: tiles of BLOCK_M rows up to and with each expert
    tiles: int  # an upper bound of all tiles


def dispatch(expert_ids: Tensor, experts: int) -> Dispatch:
    """Sorts the pairs of expert_ids (T, K) by expert, stable, on the device."""
    pairs, top_k, device = expert_ids.numel(), expert_ids.shape[1], expert_ids.device
    block_e = triton.next_power_of_2(experts)
    block = max(16, min(512, 16384 // block_e))
    blocks = triton.cdiv(pairs, block)
    ids = expert_ids.contiguous()
    count, order, token, row, offset, tile_end = (
        torch.empty(n, dtype=torch.int32, device=device)
        for n in (blocks * experts, pairs, pairs, pairs, experts + 1, experts)
    )
    _count_kernel[(blocks,)](ids, count, pairs, experts, BLOCK=block, BLOCK_E=block_e, num_warps=8)
    _offset_kernel[(1,)](
        count, offset, tile_end, blocks, experts, BLOCK_M=BLOCK_M, BLOCK=8192 // block_e, BLOCK_E=block_e, num_warps=8
    )
    _place_kernel[(blocks,)](
        ids, count, order, token, row, pairs, experts, top_k, BLOCK=block, BLOCK_E=block_e, num_warps=8
    )
    return Dispatch(order, token, row, offset, tile_end, triton.cdiv(pairs, BLOCK_M) + experts)
