"""Engram's hash: the n-gram table rows of each token.

The n-gram of order n at position t is x_t, x_{t−1}, …, x_{t−n+1}, as compressed ids; positions before the document hold
the pad id V_c. Its hash is h = XOR_k x_{t−k}·m_k with the layer's odd int64 multipliers m_k. Head j reads row
h mod p(n, j) of its part of the table; p(n, j) is a prime that no other head has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from yaongi.model.config import EngramConfig

Tensor = torch.Tensor
LARGEST = 2**63 - 1
LAYER_STRIDE = 10007  # separates the seeds of the layers


@dataclass(frozen=True)
class HashPlan:
    """The constants of one layer's hash."""

    orders: tuple[int, ...]
    multipliers: tuple[int, ...]  # one per position of the longest n-gram
    primes: tuple[tuple[int, ...], ...]  # (orders, heads): number of rows in each head's part of the table

    @property
    def rows(self) -> int:
        """Rows of the table, all heads together."""
        return sum(map(sum, self.primes))

    def constants(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return the primes and the first row of each head's part of the table, both (orders, heads) int64."""
        primes = np.array(self.primes, np.int64)
        starts = (primes.cumsum() - primes.ravel()).reshape(primes.shape)
        return torch.tensor(primes, device=device), torch.tensor(starts, device=device)


def hash_plans(engrams: Sequence[EngramConfig], compressed_vocab_size: int) -> list[HashPlan]:
    """Return the constants of every Engram of a model; no prime is used twice."""
    used: set[int] = set()
    plans = []
    for engram in engrams:
        high = max(1, LARGEST // compressed_vocab_size // 2)  # x·m ≤ 2^63 − 1, for the pad id too
        random = np.random.default_rng(engram.seed + LAYER_STRIDE * engram.layer)
        multipliers = tuple(2 * int(r) + 1 for r in random.integers(0, high, max(engram.orders)))
        primes = tuple(tuple(_next_primes(engram.rows, engram.heads, used)) for _ in engram.orders)
        plans.append(HashPlan(engram.orders, multipliers, primes))
    return plans


def ngram_window(ids: Tensor, document_ids: Tensor | None, longest: int, pad: int) -> Tensor:
    """Return x_{t−k} for k = 0, 1, …, (B, longest, L), from ids x (B, L); the pad id if t − k precedes the document."""
    places = [ids]
    for k in range(1, longest):
        shifted = torch.nn.functional.pad(ids, (k, 0), value=pad)[:, : ids.shape[1]]
        if document_ids is not None:
            other = torch.nn.functional.pad(document_ids, (k, 0), value=-1)[:, : ids.shape[1]] != document_ids
            shifted = shifted.masked_fill(other, pad)
        places.append(shifted)
    return torch.stack(places, dim=1)


def hash_rows(window: Tensor, plan: HashPlan, primes: Tensor, starts: Tensor) -> Tensor:
    """Return the table rows of each token, (B, L, orders·heads) int64, from a window (B, ≥ longest order, L) int64."""
    mixes, mix = [], window[:, 0] * plan.multipliers[0]
    for k, multiplier in enumerate(plan.multipliers[1:], 1):
        mix = mix ^ (window[:, k] * multiplier)
        if k + 1 in plan.orders:
            mixes.append(mix)
    return (torch.stack(mixes, dim=-1).unsqueeze(-1) % primes + starts).flatten(-2)


def _next_primes(start: int, count: int, used: set[int]) -> list[int]:
    """Return the first `count` primes from `start` on that are not in `used`, and add them to it."""
    found: list[int] = []
    candidate = max(start, 2)
    while len(found) < count:
        if candidate not in used and _is_prime(candidate):
            found.append(candidate)
            used.add(candidate)
        candidate += 1
    return found


def _is_prime(n: int) -> bool:
    if n < 4:
        return n >= 2
    if n % 2 == 0:
        return False
    return bool((n % np.arange(3, int(n**0.5) + 2, 2, dtype=np.int64)).all())
