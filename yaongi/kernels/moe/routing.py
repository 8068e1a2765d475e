"""The router in Triton: the experts of each token and their weights, forward and backward."""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.early_launch import early_launch, fetch_into_l2, let_next_start, wait_for_previous
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.ranks import rank
from yaongi.kernels.common.sizes import cdiv, next_power_of_2

Tensor = torch.Tensor

TAKEN = tl.constexpr(-(2**31))  # a rank below that of −∞


@triton.jit
def shares(logits, chosen):
    """Return σ(logit) / Σ σ(logit) over the chosen ones of each row, as the softmax of log σ: exact for any logit."""
    log_scores = tl.minimum(logits, 0.0, propagate_nan=tl.PropagateNan.ALL) - tl.log(1.0 + tl.exp(-tl.abs(logits)))
    largest = tl.max(tl.where(chosen & (log_scores == log_scores), log_scores, float("-inf")), axis=1)[:, None]
    weights = tl.where(chosen, tl.exp(log_scores - largest), 0.0)
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _moe_route_kernel(
    logits_ptr,  # (T, E)
    bias_ptr,  # (E)
    ids_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    load_ptr,  # (E), zero-initialised unless ALONE
    T,
    E,
    scale,
    stride_t,
    ALONE: tl.constexpr,
    EARLY: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Pick the largest score + bias K times, ties to the lowest index; weights come from the logits alone."""
    let_next_start(EARLY)
    fetch_into_l2(bias_ptr + tl.minimum(tl.arange(0, BLOCK_E), E - 1), EARLY)
    wait_for_previous(EARLY)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k_index = tl.arange(0, BLOCK_K)
    known = (t < T)[:, None] & (e < E)[None, :]
    logits = tl.load(logits_ptr + t.to(tl.int64)[:, None] * stride_t + e[None, :], mask=known, other=0.0)
    bias = tl.load(bias_ptr + e, mask=e < E, other=0.0)
    ranked = tl.where((e < E)[None, :], rank(tl.sigmoid(logits) + bias[None, :]), TAKEN)
    ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    taken = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for k in tl.static_range(K):
        best = tl.argmax(ranked, axis=1, tie_break_left=True)
        here = e[None, :] == best[:, None]
        ids = tl.where(k_index[None, :] == k, best[:, None], ids)
        chosen = tl.where(k_index[None, :] == k, tl.sum(tl.where(here, logits, 0.0), axis=1)[:, None], chosen)
        taken += here.to(tl.int32)
        ranked = tl.where(here, TAKEN, ranked)
    weights = scale * shares(chosen, (k_index < K)[None, :])
    place = t.to(tl.int64)[:, None] * K + k_index[None, :]
    stored = (t < T)[:, None] & (k_index < K)[None, :]
    tl.store(ids_ptr + place, ids, mask=stored)
    tl.store(weights_ptr + place, weights, mask=stored)
    load = tl.sum(tl.where((t < T)[:, None], taken, 0), axis=0)
    if ALONE:
        tl.store(load_ptr + e, load, mask=e < E)
    else:
        tl.atomic_add(load_ptr + e, load, mask=e < E, sem="relaxed")


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
    """Compute dlogit = scale·p·(1 − σ)·(dg − Σ p·dg) at the chosen experts, zero elsewhere."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k_index = tl.arange(0, BLOCK_K)
    mask = (t < T)[:, None] & (k_index < K)[None, :]
    place = t.to(tl.int64)[:, None] * K + k_index[None, :]
    ids = tl.load(ids_ptr + place, mask=mask, other=0)
    dweights = tl.load(dweights_ptr + place, mask=mask, other=0.0)
    mask &= (ids >= 0) & (ids < E)
    logits = tl.load(logits_ptr + t.to(tl.int64)[:, None] * stride_t + ids, mask=mask, other=0.0)
    share = tl.where(mask, shares(logits, mask), 0.0)
    mean = tl.sum(share * dweights, axis=1)[:, None]
    dchosen = scale * share * (dweights - mean) * tl.sigmoid(-logits)
    dlogits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for k in tl.static_range(K):
        this = k_index[None, :] == k
        expert = tl.sum(tl.where(this, ids, 0), axis=1)[:, None]
        dlogits = tl.where(e[None, :] == expert, tl.sum(tl.where(this, dchosen, 0.0), axis=1)[:, None], dlogits)
    known = (t < T)[:, None] & (e < E)[None, :]
    tl.store(dlogits_ptr + t.to(tl.int64)[:, None] * E + e[None, :], dlogits, mask=known)


FEW_TOKENS = 128  # up to so many, a warp per token: its maxima need no barrier


def _route_blocks(tokens: int, experts: int, top_k: int) -> dict[str, int]:
    block_e = next_power_of_2(experts)
    few = tokens <= FEW_TOKENS and block_e <= 512
    return {
        "K": top_k,
        "BLOCK_T": 1 if few else max(1, min(16, 2048 // block_e)),  # more logits per program spill registers
        "BLOCK_E": block_e,
        "BLOCK_K": next_power_of_2(top_k),
        "num_warps": 1 if few else 4,
    }


def moe_route_triton(logits: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `moe_route_reference` does, in float32."""
    T, E = logits.shape
    ids = torch.empty(T, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(T, top_k, dtype=torch.float32, device=logits.device)
    load = (torch.empty if T == 1 else torch.zeros)(E, dtype=torch.int32, device=logits.device)
    if T:
        blocks = _route_blocks(T, E, top_k)
        grid = (cdiv(T, blocks["BLOCK_T"]),)
        early = early_launch(logits) if T <= FEW_TOKENS else {"EARLY": False}
        inputs = (logits, bias.contiguous(), ids, weights, load)
        launcher(_moe_route_kernel, grid)(*inputs, T, E, scale, logits.stride(0), ALONE=T == 1, **early, **blocks)
    return ids, weights, load


def moe_route_backward_triton(dweights: Tensor, logits: Tensor, expert_ids: Tensor, scale: float) -> Tensor:
    """Compute what `moe_route_backward_reference` does, in float32."""
    (T, E), top_k = logits.shape, expert_ids.shape[1]
    dlogits = torch.empty(T, E, dtype=torch.float32, device=logits.device)
    if T:
        blocks = _route_blocks(T, E, top_k)
        grid = (cdiv(T, blocks["BLOCK_T"]),)
        inputs = (dweights.contiguous(), logits, expert_ids.contiguous(), dlogits)
        launcher(_moe_route_backward_kernel, grid)(*inputs, T, E, scale, logits.stride(0), **blocks)
    return dlogits
