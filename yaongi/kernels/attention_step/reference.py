"""Attention to a cache in plain torch; README.md in this folder has the mathematics."""

import torch
from torch.nn import functional as F

Tensor = torch.Tensor


def attention_step_reference(
    q: Tensor,  # (B, H, D)
    k: Tensor,  # (B, J, D)
    v: Tensor,  # (B, J, D)
    keys: Tensor,  # (B, J, S, D), updated in place
    values: Tensor,  # (B, J, S, D), updated in place
    visible: Tensor,  # (B, S)
    place: Tensor,  # (B)
    length: int,
) -> Tensor:  # (B, H, D)
    """Put k and v at each row's place, and attend to the visible ones of the first `length` places."""
    at = place.view(-1, 1, 1, 1).expand(*k.shape[:2], 1, k.shape[2])
    keys.scatter_(2, at, k.unsqueeze(2))
    values.scatter_(2, at, v.unsqueeze(2))
    rows = q.unflatten(1, (k.shape[1], -1))  # heads that share a key are the rows of one attention
    mask = visible[:, None, None, :length].expand(-1, *rows.shape[1:3], -1)
    y = F.scaled_dot_product_attention(rows, keys[:, :, :length], values[:, :, :length], attn_mask=mask)
    return y.flatten(1, 2).contiguous()
