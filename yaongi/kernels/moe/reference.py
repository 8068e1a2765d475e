"""Routing and the squared-ReLU experts in plain torch; README.md in this folder has the mathematics.

Sizes: T tokens, D model width, E experts, F expert width, K experts per token, R rows of one expert.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

Tensor = torch.Tensor


def moe_route_reference(
    logits: Tensor,  # (T, E)
    bias: Tensor,  # (E)
    top_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # (T, K), (T, K), (E)
    """Return each token's K experts by score + bias, their weights by the score alone, and each expert's load."""
    ranked = (logits.sigmoid() + bias).sort(dim=-1, descending=True, stable=True)  # ties go to the lowest index
    expert_ids = ranked.indices[:, :top_k].contiguous()
    expert_weights = scale * _shares(logits.gather(-1, expert_ids))
    expert_ids = expert_ids.int()
    load = torch.zeros(logits.shape[-1], dtype=torch.int32, device=logits.device)
    load.index_add_(0, expert_ids.flatten(), torch.ones_like(expert_ids).flatten())
    return expert_ids, expert_weights, load


def _shares(chosen: Tensor) -> Tensor:
    """Return σ(logit) / Σ σ(logit) of the chosen logits (T, K), as the softmax of log σ: exact for any logit."""
    return F.logsigmoid(chosen).softmax(-1)


def moe_route_backward_reference(
    dweights: Tensor,  # (T, K)
    logits: Tensor,  # (T, E)
    expert_ids: Tensor,  # (T, K)
    scale: float,
) -> Tensor:  # (T, E)
    """Return dlogits from the gradient of the weights; zero for experts that were not chosen."""
    ids = expert_ids.long()
    chosen = logits.gather(-1, ids)
    share = _shares(chosen)
    mean = (share * dweights).sum(-1, keepdim=True)
    dchosen = scale * share * (dweights - mean) * (-chosen).sigmoid()
    return torch.zeros_like(logits, memory_format=torch.contiguous_format).scatter_(-1, ids, dchosen)


def experts_with_rows(expert_ids: Tensor, experts: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield (expert, its rows of A, the routed pairs p = t·K + k in those rows), experts and pairs ascending."""
    pairs = expert_ids.flatten()
    key = torch.where((pairs >= 0) & (pairs < experts), pairs, experts)  # a bad id sorts last and is never yielded
    order = key.argsort(stable=True)
    counts = torch.bincount(key, minlength=experts + 1).tolist()
    start = 0
    for expert, count in enumerate(counts[:experts]):
        rows = slice(start, start + count)
        if count:
            yield expert, rows, order[rows]
        start += count


def moe_reference(
    x: Tensor,  # (T, D)
    w_up: Tensor,  # (E, F, D)
    w_down: Tensor,  # (E, D, F)
    expert_ids: Tensor,  # (T, K)
    expert_weights: Tensor,  # (T, K)
) -> tuple[Tensor, Tensor]:  # (T, D), (T·K, F)
    """Return y_t = Σ_k g_tk · W_down·relu(W_up·x_t)², and A = relu(H)² with its rows sorted by expert."""
    wide = torch.promote_types(x.dtype, torch.float32)
    T, K = expert_ids.shape
    a = x.new_zeros(T * K, w_up.shape[1])
    weights = expert_weights.flatten()
    parts = x.new_zeros(T * K, x.shape[1], dtype=wide)  # g·W_down·A of each pair; a skipped pair contributes zero
    for expert, rows, pairs in experts_with_rows(expert_ids, w_up.shape[0]):
        hidden = x.index_select(0, pairs // K).to(wide) @ w_up[expert].to(wide).T  # (R, F)
        a[rows] = hidden.relu_().square_().to(x.dtype)
        part = (a[rows].to(wide) @ w_down[expert].to(wide).T).mul_(weights[pairs, None])  # (R, D)
        parts.index_copy_(0, pairs, part.to(x.dtype).to(wide))  # rounded as the kernels store it
    return parts.view(T, K, x.shape[1]).sum(1).to(x.dtype), a


def moe_backward_reference(
    dy: Tensor,  # (T, D)
    x: Tensor,  # (T, D)
    w_up: Tensor,  # (E, F, D)
    w_down: Tensor,  # (E, D, F)
    expert_ids: Tensor,  # (T, K)
    expert_weights: Tensor,  # (T, K)
    a: Tensor,  # (T·K, F), as the forward saved it
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dw_up, dw_down and dexpert_weights."""
    wide = torch.promote_types(x.dtype, torch.float32)
    T, K = expert_ids.shape
    dw_up, dw_down = w_up.new_zeros(w_up.shape), w_down.new_zeros(w_down.shape)
    weights = expert_weights.flatten()
    dweights = weights.new_zeros(T * K)
    dparts = x.new_zeros(T * K, x.shape[1], dtype=wide)  # each pair's share of dx
    for expert, rows, pairs in experts_with_rows(expert_ids, w_up.shape[0]):
        tokens, g, act = pairs // K, weights[pairs, None], a[rows].to(wide)
        dy_rows = dy.index_select(0, tokens).to(wide)  # (R, D)
        dact = dy_rows @ w_down[expert].to(wide)  # (R, F), dA′: not yet weighted by g
        dweights[pairs] = (dact * act).sum(-1)
        dhidden = dact.mul_(2 * g).mul_(act.sqrt()).to(x.dtype).to(wide)  # relu(H) = sqrt(A); rounded as stored
        dparts.index_copy_(0, pairs, (dhidden @ w_up[expert].to(wide)).to(x.dtype).to(wide))
        dw_up[expert] = (dhidden.T @ x.index_select(0, tokens).to(wide)).to(w_up.dtype)
        dw_down[expert] = (dy_rows.T @ (g * act).to(x.dtype).to(wide)).to(w_down.dtype)
    return dparts.view(T, K, x.shape[1]).sum(1).to(x.dtype), dw_up, dw_down, dweights.view(T, K)


def moe_backward_accumulate_reference(
    dy: Tensor,  # (T, D)
    x: Tensor,  # (T, D)
    w_up: Tensor,  # (E, F, D)
    w_down: Tensor,  # (E, D, F)
    *rest: Tensor,  # expert_ids, expert_weights, a; dw_up and dw_down, like the weights, at least float32
) -> tuple[Tensor, Tensor]:
    """Return dx and dexpert_weights; add the weights' gradients, unrounded, to dw_up and dw_down."""
    *saved, dw_up, dw_down = rest
    dx, up, down, dweights = moe_backward_reference(dy, x, w_up.to(dw_up.dtype), w_down.to(dw_down.dtype), *saved)
    dw_up.add_(up)
    dw_down.add_(down)
    return dx, dweights
