"""Engram (arXiv 2601.07372): gated table rows of hashed n-grams, added to the hidden state before a layer's mixer."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from yaongi.kernels import causal_conv1d, causal_conv1d_step
from yaongi.model.config import EngramConfig, ModelConfig
from yaongi.model.engram.hashing import HashPlan, hash_rows
from yaongi.model.layers.accumulation import AccumulatingEmbedding, accumulation_target
from yaongi.model.layers.compiled import compiled
from yaongi.model.layers.linear import DepthwiseConv, Embedding, Linear, step_products
from yaongi.model.layers.norm import RMSNorm
from yaongi.model.layers.plain import is_plain, require_plain

Tensor = torch.Tensor
SMALLEST = 1e-6  # keeps the gradient of the square root in the "demo" gate finite


@dataclass
class EngramCache:
    """The last inputs of one layer's convolution, by phase of its dilation; the prefill fills it.

    Step t, counted from 0 after the prefill, reads and updates phase t % dilation of its row.
    """

    steps: Tensor  # (B,) int64, the steps since the prefill, t; all layers share it
    phases: Tensor | None = None  # (B, dilation, d, kernel − 1), that of step 0 first

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.phases is not None:
            self.phases = self.phases[rows]

    def put(self, rows: Tensor, other: "EngramCache") -> None:
        """Copy another cache to rows of this one; their steps go along elsewhere."""
        assert self.phases is not None
        assert other.phases is not None
        self.phases.index_copy_(0, rows, other.phases)

    def history(self) -> Tensor:
        """Return the inputs as a sequence, the oldest first: (B, (kernel − 1)·dilation, d)."""
        assert self.phases is not None
        (batch, dilation), device = self.phases.shape[:2], self.phases.device
        order = (self.steps.unsqueeze(-1) + torch.arange(dilation, device=device)) % dilation
        rows = torch.arange(batch, device=device).unsqueeze(-1)
        return self.phases[rows, order].permute(0, 3, 1, 2).flatten(1, 2)


class Engram(nn.Module):
    """h ← h + αv + SiLU(conv(RMSNorm(αv))), with k, v = W_K·e, W_V·e and α the gate of h and k."""

    def __init__(
        self,
        config: ModelConfig,
        engram: EngramConfig,
        plan: HashPlan,
        device: torch.device | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.norm_eps
        self.plan, self.gate, self.sparse = plan, engram.gate, engram.sparse_gradients
        self.dilation, self.taps = max(engram.orders), engram.kernel
        self.table = Embedding(plan.rows, engram.head_dim, device, dtype)
        self.key_proj = Linear(engram.width, width, device, dtype)
        self.value_proj = Linear(engram.width, width, device, dtype)
        self.hidden_norm = RMSNorm(width, eps, device, dtype)
        self.key_norm = RMSNorm(width, eps, device, dtype)
        self.value_norm = RMSNorm(width, eps, device, dtype)
        self.conv = DepthwiseConv(width, engram.kernel, device, dtype, bias=False)
        primes, starts = plan.constants(device)
        self.register_buffer("primes", primes, persistent=False)
        self.register_buffer("starts", starts, persistent=False)
        self.primes: Tensor
        self.starts: Tensor

    def reset_constants(self) -> None:
        """Set the hash constants."""
        primes, starts = self.plan.constants(self.primes.device)
        self.primes.copy_(primes)
        self.starts.copy_(starts)

    def forward(
        self, hidden: Tensor, window: Tensor, document_ids: Tensor | None, cache: EngramCache | None = None
    ) -> Tensor:
        """Return what to add to the hidden state, (B, L, d).

        Args:
            hidden: (B, L, d).
            window: (B, n, L) int64, `ngram_window` of the compressed ids, n ≥ the longest order.
            document_ids: (B, L) int32 or None.
            cache: filled with the convolution's last inputs. A filled one is continued: by one token, L = 1, in place;
                after more than one the steps must be counted from 0 again.

        Raises:
            ValueError: something else is in the convolution's place.
        """
        require_plain(self.conv, DepthwiseConv, "engram.conv")
        value = self._gated_value(hidden, self.look_up(window))
        normed = self.value_norm(value)
        if cache is not None and cache.phases is not None:
            if hidden.shape[1] == 1:
                y = causal_conv1d_step(normed.squeeze(1), cache.phases, self.conv.taps, steps=cache.steps)
                return value + y.unsqueeze(1)
            normed = torch.cat([cache.history(), normed], dim=1)
            cache.phases = self._last_inputs(normed, None)
            return value + self._convolved(normed, None)[:, -value.shape[1] :]
        if cache is not None:
            cache.phases = self._last_inputs(normed, document_ids)
        return value + self._convolved(normed, document_ids)

    def look_up(self, window: Tensor) -> Tensor:
        """Return e (B, L, orders·heads·head_dim). The table may be on another device, for instance in host memory."""
        constants = self.plan, self.primes, self.starts
        if not is_plain(self.table, Embedding):
            return self.table(hash_rows(window, *constants)).flatten(-2)
        table = self.table.weight
        if window.shape[-1] == 1 and not torch.is_grad_enabled() and table.device == window.device:
            return compiled(_looked_up, window.device.type)(window, table, *constants)  # in a step each launch counts
        rows = hash_rows(window, *constants)
        there = rows.to(table.device)
        gradient = accumulation_target(table)
        if gradient is None:
            found = F.embedding(there, table, sparse=self.sparse)
        else:
            if gradient.is_sparse:
                table.grad = gradient = gradient.to_dense()
            found = AccumulatingEmbedding.apply(there, table, gradient)
        return found.to(rows.device, non_blocking=True).flatten(-2)

    def _gated_value(self, hidden: Tensor, found: Tensor) -> Tensor:
        """Return αv, (…, d)."""
        products = step_products(found, self.key_proj, self.value_proj)
        key, value = products or (self.key_proj(found), self.value_proj(found))
        query, key = self.hidden_norm(hidden), self.key_norm(key)
        return compiled(_gated, hidden.device.type)(query, key, value, self.gate)

    def _convolved(self, x: Tensor, document_ids: Tensor | None) -> Tensor:
        """Return SiLU of the dilated convolution, computed as a plain one on each of `dilation` interleaved phases."""
        length = x.shape[1]
        documents = None if document_ids is None else self._phases(document_ids.unsqueeze(-1)).squeeze(-1)
        y = causal_conv1d(self._phases(x), self.conv.taps, document_ids=documents)
        return y.unflatten(0, (-1, self.dilation)).transpose(1, 2).flatten(1, 2)[:, :length]

    def _phases(self, x: Tensor) -> Tensor:
        """Rearrange (B, L, C) to (B·dilation, L / dilation rounded up, C): position t goes to phase t % dilation.

        The end is padded with copies of the last position. The convolution is causal, so they affect nothing before
        them, and the caller cuts them off.
        """
        short = -x.shape[1] % self.dilation
        if short:
            x = torch.cat([x, x[:, -1:].expand(-1, short, -1)], dim=1)
        return x.unflatten(1, (-1, self.dilation)).transpose(1, 2).flatten(0, 1).contiguous()

    def _last_inputs(self, x: Tensor, document_ids: Tensor | None) -> Tensor:
        """Return each phase's last inputs after x (B, L, d), in the order in which the next tokens need them.

        They are (B, dilation, d, taps − 1).
        """
        if document_ids is not None:
            x = torch.where((document_ids == document_ids[:, -1:]).unsqueeze(-1), x, 0)
        history = (self.taps - 1) * self.dilation
        tail = F.pad(x, (0, 0, history, 0))[:, -history:] if history else x[:, :0]
        steps = tail.unflatten(1, (self.taps - 1, self.dilation))  # (B, taps − 1, dilation, d), oldest first
        return steps.permute(0, 2, 3, 1).contiguous()


def _looked_up(window: Tensor, table: Tensor, plan: HashPlan, primes: Tensor, starts: Tensor) -> Tensor:
    """Return the tokens' table rows side by side, (B, L, orders·heads·head_dim)."""
    return F.embedding(hash_rows(window, plan, primes, starts), table).flatten(-2)


def _gated(query: Tensor, key: Tensor, value: Tensor, gate: str) -> Tensor:
    """Return α·value for normalised query and key, all (…, d); α is computed in float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    score = (query.to(wide) * key.to(wide)).sum(-1, keepdim=True) * query.shape[-1] ** -0.5
    if gate == "demo":
        score = score.sign() * score.abs().clamp(min=SMALLEST).sqrt()
    return (score.sigmoid() * value.to(wide)).to(query.dtype)
