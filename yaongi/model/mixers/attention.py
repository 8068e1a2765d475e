"""Grouped-query attention without position embeddings."""

from dataclasses import dataclass

import torch
from torch import nn

from yaongi.model.config import ModelConfig
from yaongi.model.layers.linear import Linear
from yaongi.model.mixers.attention_backends import AttentionPlan, attend, scaled_attention

Tensor = torch.Tensor


@dataclass
class AttentionCache:
    """Keys and values of one layer, (B, kv heads, capacity, D)."""

    keys: Tensor
    values: Tensor


class Attention(nn.Module):
    """softmax(q·kᵀ/√D)·v; (heads / kv heads) query heads share a key and value head; no RoPE, no QK norm."""

    def __init__(self, config: ModelConfig, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        width, head = config.hidden_size, config.attention_head_dim
        self.heads, self.kv_heads, self.head_dim = config.attention_heads, config.attention_kv_heads, head
        self.q_proj = Linear(width, self.heads * head, device, dtype)
        self.k_proj = Linear(width, self.kv_heads * head, device, dtype)
        self.v_proj = Linear(width, self.kv_heads * head, device, dtype)
        self.o_proj = Linear(self.heads * head, width, device, dtype)

    def forward(self, x: Tensor, plan: AttentionPlan, cache: AttentionCache | None = None) -> Tensor:
        """Map (B, L, d) to (B, L, d), and write keys and values to the start of the cache."""
        q, k, v = self._project(x)
        if cache is not None:
            cache.keys[:, :, : x.shape[1]] = k.transpose(1, 2)
            cache.values[:, :, : x.shape[1]] = v.transpose(1, 2)
        return self.o_proj(attend(q, k, v, plan).flatten(-2))

    def step(self, x: Tensor, cache: AttentionCache, position: int, visible: Tensor) -> Tensor:
        """Map one token (B, d) to (B, d), and write its key and value to the cache.

        Args:
            position: the token's position in the cache.
            visible: (B, capacity) bool, the cache positions that the token may attend to.
        """
        q, k, v = self._project(x.unsqueeze(1))
        cache.keys[:, :, position], cache.values[:, :, position] = k[:, 0], v[:, 0]
        mask = visible[:, None, None, : position + 1]
        keys, values = cache.keys[:, :, : position + 1], cache.values[:, :, : position + 1]
        return self.o_proj(scaled_attention(q.transpose(1, 2), keys, values, mask).flatten(1))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, d) to q (B, L, heads, D), k and v (B, L, kv heads, D)."""
        q, x = self.q_proj.fork(x)
        k, x = self.k_proj.fork(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, self.v_proj(x)))
        return q, k, v
