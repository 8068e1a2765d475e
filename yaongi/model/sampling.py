"""The choice of the next token from its logits: the project's one sampler."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from yaongi.kernels import likeliest
from yaongi.settings import FieldChecks

Tensor = torch.Tensor
ROUNDING = 1e-12  # relative; a sum of probabilities that reaches top_p but for this has reached it


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The steps apply in this order: penalty, temperature, top_k, top_p."""

    temperature: float = 0.0  # 0 takes the likeliest token, 1 samples from the model's distribution
    top_k: int | None = None  # sample among the k likeliest tokens; None: among all
    top_p: float | None = None  # sample among the fewest likeliest tokens that together have this probability
    repetition_penalty: float = 1.0  # divides positive logits of tokens that were there, multiplies negative ones

    def __post_init__(self) -> None:
        """Check the fields. Raises ValueError for one that is out of range."""
        check = FieldChecks("generate")
        finite = 0 <= self.temperature < math.inf
        check.require(finite, "temperature", "a finite number, 0 or more", self.temperature)
        check.require(self.top_k is None or self.top_k >= 1, "top_k", "1 or more", self.top_k)
        check.require(self.top_p is None or 0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        penalty = self.repetition_penalty
        check.require(0 < penalty < math.inf, "repetition_penalty", "a finite number above 0", penalty)


@dataclass(frozen=True)
class RowSampling:
    """`Sampling` of each row of a batch, without penalties."""

    temperature: Tensor  # (B, 1) float64; 1 for a row that takes the likeliest token
    top_k: Tensor | None  # (B, 1) int64, V for a row without a limit; None: no row has one
    top_p: Tensor | None  # (B, 1) float64, 2 for a row without a limit, which no sum reaches; None: no row has one
    greedy: Tensor  # (B,) bool, rows that take the likeliest token

    @classmethod
    def of(cls, rows: Sequence[Sampling], vocab_size: int, device: torch.device) -> "RowSampling | Sampling":
        """Return the rows' settings on a device; where they are all the same, just them.

        Raises:
            ValueError: a row has a repetition penalty.
        """
        if any(row.repetition_penalty != 1 for row in rows):
            raise ValueError("generate: repetition_penalty must be 1 for rows that differ, got another")
        if len(set(rows)) == 1:
            return rows[0]

        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).unsqueeze(-1).to(device, non_blocking=True)

        top_k: list[float] = [row.top_k or vocab_size for row in rows]
        top_p = [2.0 if row.top_p in (None, 1) else row.top_p or 0.0 for row in rows]
        return cls(
            column([row.temperature or 1.0 for row in rows], torch.float64),
            column(top_k, torch.int64) if min(top_k) < vocab_size else None,
            column(top_p, torch.float64) if min(top_p) < 1 else None,
            torch.tensor([row.temperature == 0 for row in rows]).to(device, non_blocking=True),
        )


def choose(logits: Tensor, sampling: Sampling | RowSampling, uniforms: Tensor | None = None) -> Tensor:
    """Choose a token for each row; of equally likely tokens the one with the smaller id comes first.

    Args:
        logits: (B, V); −∞ for tokens that must not come.
        sampling: of all rows, or of each; a penalty must have been applied.
        uniforms: (B,) float64, uniform in [0, 1), on the logits' device; None for temperature 0.

    Returns:
        (B,) int64, −1 for a row of which no logit is finite, or one is NaN or +∞.
    """
    best = likeliest(logits)
    if isinstance(sampling, Sampling) and sampling.temperature == 0:
        return best
    if uniforms is None:
        raise ValueError("choose: uniforms must be given for a temperature above 0, got none")
    chosen = _sampled(logits, sampling, uniforms)
    if isinstance(sampling, RowSampling):
        chosen = torch.where(sampling.greedy, best, chosen)
    return torch.where(best < 0, -1, chosen)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits (B, V) with the penalty on the tokens that are True in `seen` (B, V)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def row_uniforms(seed: int, prompt: Sequence[int], copy: int, count: int) -> NDArray[np.float64]:
    """Return the random numbers of a row's first `count` tokens, (count,) float64 in [0, 1).

    They depend on the seed, the prompt, and how many equal prompts came before it in the batch, `copy`; on nothing else
    in the batch, and not on `count`.
    """
    key = hashlib.sha256(f"{seed}/{copy}/{list(map(int, prompt))}".encode()).digest()
    return np.random.default_rng(int.from_bytes(key, "little")).random(count)


def _sampled(logits: Tensor, sampling: Sampling | RowSampling, uniforms: Tensor) -> Tensor:
    """Sample by the inverse of the cumulative distribution, in float64."""
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    wide = ranked.double()
    # The difference comes first: at the smallest temperatures it is 0 / T for the likeliest and −∞ for the others.
    weights = ((wide - wide[:, :1]) / sampling.temperature).exp()
    if sampling.top_k is not None:
        weights = weights.masked_fill(torch.arange(weights.shape[1], device=weights.device) >= sampling.top_k, 0)
    if sampling.top_p is not None and (isinstance(sampling, RowSampling) or sampling.top_p < 1):
        sums = weights.cumsum(-1)
        reached = (sums - weights) >= sums[:, -1:] * (sampling.top_p * (1 - ROUNDING))
        reached[:, 0] = False
        weights = weights.masked_fill(reached, 0)
    sums = weights.cumsum(-1)
    place = torch.searchsorted(sums, uniforms.unsqueeze(-1) * sums[:, -1:], right=True)
    last = (weights > 0).sum(-1, keepdim=True) - 1  # rounding may lead beyond the last token that can come
    return order.gather(-1, torch.minimum(place, last).clamp(min=0)).squeeze(-1)
