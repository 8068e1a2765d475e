"""Grouped-query attention without position embeddings."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from yaongi.kernels import attention_step
from yaongi.model.config import ModelConfig
from yaongi.model.layers.linear import Linear, fork, step_products
from yaongi.model.mixers.attention_backends import (
    AttentionPlan,
    CachedAttention,
    ContinuedAttention,
    attend,
    scaled_attention,
)

Tensor = torch.Tensor


@dataclass
class AttentionCache:
    """Keys and values of one layer, (B, kv heads, capacity, D); the prefill makes them."""

    capacity: int
    keys: Tensor | None = None
    values: Tensor | None = None

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Make room, and put k and v (B, L, kv heads, D) at its start."""
        more = self.capacity - k.shape[1]
        self.keys, self.values = (F.pad(t.transpose(1, 2), (0, 0, 0, more)) for t in (k, v))

    def extend(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, L, kv heads, D) at `start`, and return all up to their end, (B, kv heads, start + L, D)."""
        assert self.keys is not None
        assert self.values is not None
        end = start + k.shape[1]
        self.keys[:, :, start:end], self.values[:, :, start:end] = k.transpose(1, 2), v.transpose(1, 2)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def grow(self, capacity: int) -> None:
        """Make room for so many tokens."""
        if self.keys is not None and self.values is not None:
            more = capacity - self.capacity
            self.keys, self.values = (F.pad(t, (0, 0, 0, more)) for t in (self.keys, self.values))
        self.capacity = capacity

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def first(self, rows: int) -> "AttentionCache":
        """Return the first rows, in the same memory."""
        assert self.keys is not None
        assert self.values is not None
        return AttentionCache(self.capacity, self.keys[:rows], self.values[:rows])

    def put(self, rows: Tensor, other: "AttentionCache", lengths: Tensor, end: int) -> None:
        """Copy the places before `end` of another cache to the start of rows of this one, the last `lengths` of each.

        The other places of these rows are cleared: 0·NaN is NaN.
        """
        places = torch.arange(end, device=rows.device)
        source = (end - lengths.unsqueeze(1) + places).clamp(max=end - 1)[:, None, :, None]  # (rows, 1, end, 1)
        beyond = (places >= lengths.unsqueeze(1))[:, None, :, None]
        for own, new in ((self.keys, other.keys), (self.values, other.values)):
            assert own is not None
            assert new is not None
            moved = new[:, :, :end]
            moved = moved.gather(2, source.expand_as(moved)).masked_fill_(beyond, 0)
            own[:, :, :end].index_copy_(0, rows, moved)
            own[:, :, end:].index_fill_(0, rows, 0)


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

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan | CachedAttention | ContinuedAttention,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Map (B, L, d) to (B, L, d), and write keys and values to the start of the cache.

        With a `CachedAttention` for a plan, x is one token, (B, 1, d), whose key and value go to the plan's place, and
        which attends to what the cache holds. With a `ContinuedAttention` it is more tokens of the cache's rows.
        """
        q, k, v = self._project(x)
        if isinstance(plan, CachedAttention):
            return self.o_proj(self._step(q, k, v, plan, cache).flatten(-2))
        if isinstance(plan, ContinuedAttention):
            keys, values = _filled(cache).extend(plan.start, k, v)
            return self.o_proj(scaled_attention(q.transpose(1, 2), keys, values, plan.mask).transpose(1, 2).flatten(-2))
        if cache is not None:
            cache.fill(k, v)
        return self.o_proj(attend(q, k, v, plan).flatten(-2))

    def core(self, projected: Tensor, plan: AttentionPlan) -> Tensor:
        """Map q, k and v side by side, (B, L, …), to o_proj's input (B, L, heads·D)."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in projected.split([width, kv_width, kv_width], dim=-1))
        return attend(q, k, v, plan).flatten(-2)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, plan: CachedAttention, cache: AttentionCache | None) -> Tensor:
        """Add one token's key and value to the cache, and attend to it; all (B, 1, …, D)."""
        cache = _filled(cache)
        assert cache.keys is not None
        assert cache.values is not None
        q, k, v = (t.squeeze(1) for t in (q, k, v))
        return attention_step(q, k, v, cache.keys, cache.values, plan.visible, plan.place, plan.length).unsqueeze(1)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, d) to q (B, L, heads, D), k and v (B, L, kv heads, D)."""
        products = step_products(x, self.q_proj, self.k_proj, self.v_proj)
        if products is None:
            q, x = fork(self.q_proj, x)
            k, x = fork(self.k_proj, x)
            products = q, k, self.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in products)
        return q, k, v


def _filled(cache: AttentionCache | None) -> AttentionCache:
    """Return the cache. Raises ValueError if no prefill has filled it."""
    if cache is None or cache.keys is None or cache.values is None:
        raise ValueError("attention: cache must be one that a prefill has filled, got an empty one")
    return cache
