"""The causal convolution in plain torch; README.md in this folder has the mathematics.

The sequence is extended to the left by its W − 1 earlier inputs (the initial state, or zeros), so that tap k of output
l reads the extended position l + k; the final state is the extended sequence's last W − 1 positions.
"""

import torch
from torch.nn import functional as F

from yaongi.kernels.common.dtypes import compute_dtype

Tensor = torch.Tensor


def causal_conv1d_reference(
    x: Tensor,  # (B, L, C)
    weight: Tensor,  # (C, W)
    bias: Tensor | None,  # (C)
    document_ids: Tensor | None,  # (B, L)
    initial_state: Tensor | None,  # (B, C, W − 1)
    activation: str | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:  # (B, L, C), (B, C, W − 1) or empty
    """Return y = activation(bias + Σ_k weight_k · x_{l−W+1+k}) within documents, and the last W − 1 inputs."""
    wide = compute_dtype(x, weight)
    extended = _extended(x, initial_state, weight.shape[1]).to(wide)
    masks = _masks(document_ids, weight.shape[1])
    pre = _pre_activation(extended, _taps(weight, wide), bias, masks)
    y = F.silu(pre) if activation == "silu" else pre
    if not return_final_state:
        return y.to(x.dtype), x.new_empty(0)
    final = _masked(extended[:, x.shape[1] :], _final_mask(document_ids, weight.shape[1]))
    return y.to(x.dtype), _as_state(final, x.dtype)


def causal_conv1d_backward_reference(
    dy: Tensor,  # (B, L, C)
    dfinal_state: Tensor | None,  # (B, C, W − 1)
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # like x, weight, bias, initial_state; empty for a None
    """Return the gradients; the pre-activation value is recomputed."""
    wide, length, width = compute_dtype(x, weight), x.shape[1], weight.shape[1]
    extended = _extended(x, initial_state, width).to(wide)
    masks, taps = _masks(document_ids, width), _taps(weight, wide)
    dpre = dy.to(wide)
    if activation == "silu":
        pre = _pre_activation(extended, taps, bias, masks)
        dpre = torch.ops.aten.silu_backward(dpre, pre)
    dextended = torch.zeros_like(extended)  # (B, W − 1 + L, C)
    dtaps = []
    for k, (mask, tap) in enumerate(zip(masks, taps, strict=True)):
        dtap = _masked(dpre, mask)
        dextended[:, k : k + length].addcmul_(dtap, tap)
        dtaps.append((dtap * extended[:, k : k + length]).sum((0, 1)))
    dweight = torch.stack(dtaps, dim=1)
    if dfinal_state is not None:
        dextended[:, length:] += _masked(dfinal_state.to(wide).mT, _final_mask(document_ids, width))
    dx = dextended[:, width - 1 :].to(x.dtype).contiguous()
    dbias = x.new_empty(0) if bias is None else dpre.sum((0, 1))
    if initial_state is None:
        return dx, dweight, dbias, x.new_empty(0)
    return dx, dweight, dbias, _as_state(dextended[:, : width - 1], x.dtype)


def causal_conv1d_step_reference(
    x: Tensor,  # (B, C)
    state: Tensor,  # (B, C, W − 1), or (B, P, C, W − 1) with steps; updated in place
    weight: Tensor,  # (C, W)
    bias: Tensor | None,  # (C)
    activation: str | None,
    steps: Tensor | None,  # (B)
) -> Tensor:  # (B, C)
    """Return one output; the state, or the one of its phase, drops its oldest input and appends x."""
    wide = compute_dtype(x, weight)
    own = ... if steps is None else (torch.arange(len(steps), device=x.device), steps % state.shape[1])
    window = torch.cat([state[own], x.unsqueeze(-1)], dim=-1)  # (B, C, W)
    pre = (window.to(wide) * weight.to(wide)).sum(-1)
    if bias is not None:
        pre = pre + bias.to(wide)
    state[own] = window[..., 1:]
    return (F.silu(pre) if activation == "silu" else pre).to(x.dtype)


def _extended(x: Tensor, initial_state: Tensor | None, width: int) -> Tensor:
    """Return the W − 1 inputs before the sequence, then the sequence: (B, W − 1 + L, C)."""
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if initial_state is None else initial_state.mT
    return torch.cat([before, x], dim=1)


def _as_state(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy positions (B, W − 1, C) into a new contiguous state, (B, C, W − 1)."""
    return positions.mT.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _masks(document_ids: Tensor | None, width: int) -> list[Tensor | None]:
    """Return for each tap where it reads its own document, (B, L, 1); None means everywhere, as of the last tap."""
    if document_ids is None:
        return [None] * width
    ids, length = _extended_ids(document_ids, width), document_ids.shape[1]
    return [(ids[:, k : k + length] == document_ids).unsqueeze(-1) for k in range(width - 1)] + [None]


def _taps(weight: Tensor, wide: torch.dtype) -> Tensor:
    """Return the weight by tap, (W, C), contiguous: a product with a strided row takes a CPU six times as long."""
    return weight.T.to(wide).contiguous()


def _final_mask(document_ids: Tensor | None, width: int) -> Tensor | None:
    """Return which of the last W − 1 extended positions belong to the last document: (B, W − 1, 1)."""
    if document_ids is None:
        return None
    tail = _extended_ids(document_ids, width)[:, document_ids.shape[1] :]
    return (tail == document_ids[:, -1:]).unsqueeze(-1)


def _extended_ids(document_ids: Tensor, width: int) -> Tensor:
    """Return the extended sequence's ids, (B, W − 1 + L); the initial state belongs to the first document."""
    return torch.cat([document_ids[:, :1].expand(-1, width - 1), document_ids], dim=1)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Zero positions of other documents; `where`, not a product, so that not even a NaN of theirs leaks."""
    return values if mask is None else torch.where(mask, values, 0)


def _pre_activation(extended: Tensor, taps: Tensor, bias: Tensor | None, masks: list[Tensor | None]) -> Tensor:
    """Return bias + Σ_k taps_k · extended_{l+k}, (B, L, C)."""
    length = extended.shape[1] - len(masks) + 1
    pre = extended.new_zeros(len(extended), length, extended.shape[2])
    if bias is not None:
        pre += bias.to(pre.dtype)
    for k, (mask, tap) in enumerate(zip(masks, taps, strict=True)):
        pre.addcmul_(_masked(extended[:, k : k + length], mask), tap)
    return pre
