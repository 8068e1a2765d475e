"""The mixture: shares of domains and sources, and the stream of each sample, so that every prefix has the ratios.

The shares become integers that sum to W. One period of W samples is laid out by Tijdeman's solution of the chairman
assignment problem (R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980). This is error
diffusion with deadlines: it keeps |n · share - count| ≤ 1 - 1/(2k-2) < 1 for k streams at every n, where plain error
diffusion (largest deficit first) can exceed 1. The period repeats, so the stream of sample n and its place within that
stream are table look-ups, and no state is needed.
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import gcd

import numpy as np
from numpy.typing import NDArray

PLAN: Mapping[str, float] = {"ko": 40, "en": 20, "code": 25, "math": 15}  # the public mix, in percent
_FINEST = 10_000
_LONGEST = 100  # bytes of a domain's name, which is a part of file names


def check_domain(name: str) -> str:
    """Return the name of a domain in NFC.

    Raises:
        ValueError: it is empty or too long, or a folder or a mix could not bear it.
    """
    name = unicodedata.normalize("NFC", name)
    odd = name != name.strip() or name.startswith(".") or any(c in "/,=:" or not c.isprintable() for c in name)
    if not name or odd or len(name.encode("utf-8", "replace")) > _LONGEST:
        wanted = f"1 to {_LONGEST} bytes without , = : / or a dot in front"
        raise ValueError(f"mix: the name of a domain must be {wanted}, got {name!r}")
    return name


def check_mix(mix: Mapping[str, float]) -> dict[str, float]:
    """Return the positive shares of `mix`: those of `PLAN` in its order, then the others by name.

    Raises:
        ValueError: a name can't be a domain's, a share is negative or not finite, or no share is above 0.
    """
    for domain, share in mix.items():
        check_domain(domain)
        if not 0 <= share < float("inf"):
            raise ValueError(f"mix: the share of {domain} must be 0 or more, got {share}")
    kept = {domain: float(mix[domain]) for domain in in_order(mix) if mix[domain] > 0}
    if not kept:
        raise ValueError(f"mix: a share must be above 0, got {dict(mix)}")
    return kept


def in_order(domains: Iterable[str]) -> list[str]:
    """Return domains in the one order that they have everywhere: those of `PLAN` first, then the others by name."""
    places = {domain: place for place, domain in enumerate(PLAN)}
    return sorted(set(domains), key=lambda domain: (places.get(domain, len(places)), domain))


def parse_mix(text: str) -> dict[str, float]:
    """Parse shares from text such as `ko=40,law=20`. Raises ValueError as `check_mix` does."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        domain, _, share = part.strip().rpartition("=")
        try:
            shares[check_domain(domain.strip())] = float(share)
        except ValueError as error:
            raise ValueError(f"mix: must be DOMAIN=SHARE,…, got {text!r}") from error
    return check_mix(shares)


def mix_text(mix: Mapping[str, float]) -> str:
    """Return shares as the text that `parse_mix` reads."""
    return ",".join(f"{domain}={share!r}".removesuffix(".0") for domain, share in check_mix(mix).items())


def choose_mix(asked: str, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the shares that the text `asked` names; if it is empty, shares for the domains that have text.

    Those are the shares of `PLAN` if it knows all of the domains, else the domains' sizes in percent, so that every
    text is read equally often.

    Args:
        sizes: how much text each domain has, in any unit; 0 is none.

    Raises:
        ValueError: `asked` can't be parsed, or a domain of it has no text, or none has.
    """
    there = [domain for domain in in_order(sizes) if sizes[domain]]
    if not there:
        raise ValueError("mix: a domain must have text, got none")
    if not asked and set(there) <= set(PLAN):
        return check_mix({domain: PLAN[domain] for domain in there})
    if not asked:
        percent = {domain: 100 * sizes[domain] / sum(sizes.values()) for domain in there}
        return check_mix({domain: max(0.01, round(share, 2)) for domain, share in percent.items()})
    mix = parse_mix(asked)
    if missing := [domain for domain in mix if domain not in there]:
        raise ValueError(f"mix: domains must be among {', '.join(there)}, which have text, got {', '.join(missing)}")
    return mix


def planned_shares(planned: Sequence[float | None]) -> list[float] | None:
    """Return the shares of a domain's sources if the plan names several and every one of them; None: go by size."""
    shares = [share for share in planned if share is not None]
    return shares if 1 < len(planned) == len(shares) else None


def integer_shares(mix: Mapping[str, float]) -> dict[str, int]:
    """Return positive shares as integers: exact with a common denominator up to 10,000, else rounded to 1/10,000."""
    exact = {name: Fraction(repr(float(share))) for name, share in mix.items()}
    total = sum(exact.values())
    shares = {name: share / total for name, share in exact.items()}
    size = 1
    for share in shares.values():
        size = size * share.denominator // gcd(size, share.denominator)
    if size <= _FINEST:
        return {name: int(share * size) for name, share in shares.items()}
    rounded = {name: max(1, round(share * _FINEST)) for name, share in shares.items()}
    rounded[max(rounded, key=rounded.__getitem__)] += _FINEST - sum(rounded.values())
    return rounded


class Mixture:
    """The stream of every sample, and its place among the samples of that stream."""

    def __init__(self, mix: Mapping[str, float]) -> None:
        """Lay out one period.

        Args:
            mix: positive shares, on any scale.
        """
        self.shares = integer_shares(mix)
        self.names = tuple(self.shares)
        self._size = np.array(list(self.shares.values()), np.int64)  # (streams,)
        self._pattern = _tijdeman(self._size)  # (W,)
        one_hot = self._pattern[:, None] == np.arange(len(self.names))
        before = np.vstack([np.zeros(len(self.names), np.int64), one_hot.cumsum(0)])
        self._before = before  # (W + 1, streams): samples of each stream before a place in the period

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return for sample numbers (n,) the index into `names` and the number of earlier samples of that stream."""
        period, place = np.divmod(samples, len(self._pattern))
        stream = self._pattern[place]
        return stream, period * self._size[stream] + self._before[place, stream]

    def counts(self, samples: int) -> dict[str, int]:
        """Return how many of the first `samples` samples come from each stream."""
        period, place = divmod(samples, len(self._pattern))
        total = period * self._size + self._before[place]
        return dict(zip(self.names, total.tolist(), strict=True))


def _tijdeman(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return one period of the pattern for integer shares `sizes` (streams,)."""
    shares = sizes.tolist()
    total, streams = sum(shares), len(shares)
    if streams == 1:
        return np.zeros(total, np.int64)
    scale = 2 * streams - 2  # everything below is in units of 1 / (scale · total), so the arithmetic is exact
    taken = [0] * streams
    pattern = []
    for step in range(1, total + 1):
        ready = (i for i in range(streams) if scale * (shares[i] * step - total * taken[i]) >= total)
        chosen = min(ready, key=lambda i: Fraction(scale * taken[i] + scale - 1, shares[i]))
        taken[chosen] += 1
        pattern.append(chosen)
    return np.array(pattern, np.int64)
