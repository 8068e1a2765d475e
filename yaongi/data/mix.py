"""The mixture: the domain of each sample, chosen so that every prefix has the configured ratios to within one row.

The shares become integers that sum to W. One period of W samples is laid out by Tijdeman's solution of the chairman
assignment problem (R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980). This is error
diffusion with deadlines: it keeps |n · share - count| ≤ 1 - 1/(2k-2) < 1 for k domains at every n, where plain error
diffusion (largest deficit first) can exceed 1. The period repeats, so the domain of sample n and its place within that
domain are table look-ups, and no state is needed.
"""

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from math import gcd

import numpy as np
from numpy.typing import NDArray

DOMAINS = ("ko", "en", "code", "math")
DEFAULT_MIX: Mapping[str, float] = {"ko": 40, "en": 20, "code": 25, "math": 15}
DEFAULT_MIX_TEXT = ",".join(f"{domain}={share:g}" for domain, share in DEFAULT_MIX.items())
_FINEST = 10_000


def check_mix(mix: Mapping[str, float]) -> dict[str, float]:
    """Return the positive shares of `mix`, in the order of `DOMAINS`.

    Raises:
        ValueError: a domain is unknown, a share is negative or not finite, or no share is above 0.
    """
    for domain, share in mix.items():
        if domain not in DOMAINS:
            raise ValueError(f"mix: domains must be among {list(DOMAINS)}, got {domain!r}")
        if not 0 <= share < float("inf"):
            raise ValueError(f"mix: the share of {domain} must be 0 or more, got {share}")
    kept = {domain: float(mix[domain]) for domain in DOMAINS if mix.get(domain, 0) > 0}
    if not kept:
        raise ValueError(f"mix: a share must be above 0, got {dict(mix)}")
    return kept


def parse_mix(text: str) -> dict[str, float]:
    """Parse shares from text such as `ko=40,en=20`. Raises ValueError as `check_mix` does."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        domain, _, share = part.strip().partition("=")
        try:
            shares[domain] = float(share)
        except ValueError as error:
            raise ValueError(f"mix: must be DOMAIN=SHARE,…, got {text!r}") from error
    return check_mix(shares)


def integer_shares(mix: Mapping[str, float]) -> dict[str, int]:
    """Return the shares as integers: exact if they have a common denominator up to 10,000, else rounded to 1/10,000."""
    exact = {domain: Fraction(repr(share)) for domain, share in check_mix(mix).items()}
    total = sum(exact.values())
    shares = {domain: share / total for domain, share in exact.items()}
    size = 1
    for share in shares.values():
        size = size * share.denominator // gcd(size, share.denominator)
    if size <= _FINEST:
        return {domain: int(share * size) for domain, share in shares.items()}
    rounded = {domain: max(1, round(share * _FINEST)) for domain, share in shares.items()}
    rounded[max(rounded, key=rounded.__getitem__)] += _FINEST - sum(rounded.values())
    return rounded


class Mixture:
    """The domain of every sample, and its place among the samples of that domain."""

    def __init__(self, mix: Mapping[str, float]) -> None:
        """Lay out one period.

        Args:
            mix: shares of the domains, on any scale.

        Raises:
            ValueError: as in `check_mix`.
        """
        self.shares = integer_shares(mix)
        self.domains = tuple(self.shares)
        self._size = np.array(list(self.shares.values()), np.int64)  # (domains,)
        self._pattern = _tijdeman(self._size)  # (W,)
        one_hot = self._pattern[:, None] == np.arange(len(self.domains))
        before = np.vstack([np.zeros(len(self.domains), np.int64), one_hot.cumsum(0)])
        self._before = before  # (W + 1, domains): samples of each domain before a place in the period

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return for sample numbers (n,) the index into `domains` and the number of earlier samples of that domain."""
        period, place = np.divmod(samples, len(self._pattern))
        domain = self._pattern[place]
        return domain, period * self._size[domain] + self._before[place, domain]

    def counts(self, samples: int) -> dict[str, int]:
        """Return how many of the first `samples` samples come from each domain."""
        period, place = divmod(samples, len(self._pattern))
        total = period * self._size + self._before[place]
        return dict(zip(self.domains, total.tolist(), strict=True))


def _tijdeman(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return one period of the domain pattern for integer shares `sizes` (domains,)."""
    shares = sizes.tolist()
    total, domains = sum(shares), len(shares)
    if domains == 1:
        return np.zeros(total, np.int64)
    scale = 2 * domains - 2  # everything below is in units of 1 / (scale · total), so the arithmetic is exact
    taken = [0] * domains
    pattern = []
    for step in range(1, total + 1):
        ready = (i for i in range(domains) if scale * (shares[i] * step - total * taken[i]) >= total)
        chosen = min(ready, key=lambda i: Fraction(scale * taken[i] + scale - 1, shares[i]))
        taken[chosen] += 1
        pattern.append(chosen)
    return np.array(pattern, np.int64)


def mixed_documents(
    sources: Mapping[str, Callable[[], Iterator[str]]], mix: Mapping[str, float], total_bytes: int
) -> Iterator[str]:
    """Yield about `total_bytes` of documents, with the domains at their ratios by bytes.

    A domain that runs out starts from its first document again.

    Args:
        sources: for each domain, a function that iterates over its documents from the start.

    Raises:
        ValueError: a domain of the mix has no source, or no text.
    """
    shares = check_mix(mix)
    missing = [domain for domain in shares if domain not in sources]
    if missing:
        raise ValueError(f"mix: {', '.join(shares)} must have text, got none for {', '.join(missing)}")
    scale = sum(shares.values())
    streams = {domain: sources[domain]() for domain in shares}
    given = dict.fromkeys(shares, 0)
    while (done := sum(given.values())) < total_bytes:
        domain = max(shares, key=lambda d: shares[d] / scale * done - given[d])
        text = next(streams[domain], None)
        if text is None:
            if not given[domain]:
                raise ValueError(f"mix: no text in the sources of {domain}")
            streams[domain] = sources[domain]()
            continue
        given[domain] += len(text.encode("utf-8", "surrogatepass"))
        yield text
