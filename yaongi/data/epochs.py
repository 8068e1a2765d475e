"""How often a run reads each stream: tokens there, tokens wanted, epochs, and from how many on that is a mistake.

A language model gains about as much from text that it reads up to four times as from new text, and little from more
(Muennighoff et al., "Scaling data-constrained language models", NeurIPS 2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WORTHWHILE, MOST = 4, 16


@dataclass(frozen=True)
class Epochs:
    """The use of one stream by a run; `wanted` is fractional, the stream's share of the run's tokens."""

    name: str
    there: int  # tokens
    wanted: float  # tokens

    @property
    def number(self) -> float:
        """How often the stream is read."""
        return self.wanted / self.there

    def __str__(self) -> str:
        return f"{self.name}: {self.there:,} tokens there, {self.wanted:,.0f} wanted, {self.number:,.2f} epochs"


def count_epochs(there: Mapping[str, int], shares: Mapping[str, int], tokens: float) -> list[Epochs]:
    """Return the epochs of each stream in a run on `tokens` tokens.

    Args:
        there: tokens of each stream, above 0.
        shares: the share of each stream, on any scale.
    """
    total = sum(shares.values())
    return [Epochs(name, there[name], tokens * share / total) for name, share in shares.items()]


def tokens_for(there: Mapping[str, int], shares: Mapping[str, int], epochs: float) -> int:
    """Return how many tokens a run can have that reads no stream more often than `epochs` times."""
    total = sum(shares.values())
    return int(min(epochs * there[name] * total / share for name, share in shares.items()))


def epoch_warnings(streams: Sequence[Epochs]) -> list[str]:
    """Return a line for each stream that is read more than four times."""
    return [
        f"{stream.name} is read {stream.number:,.1f} times: above {WORTHWHILE} epochs little more is learnt"
        for stream in streams
        if stream.number > WORTHWHILE
    ]


def check_epochs(streams: Sequence[Epochs], allowed: bool) -> None:
    """Raise ValueError if a stream is read more than 16 times, unless that is `allowed`."""
    most = max(streams, key=lambda stream: stream.number)
    if most.number > MOST and not allowed:
        raise ValueError(f"epochs: must be at most {MOST}, or allowed by --allow-epochs, got {most}")
