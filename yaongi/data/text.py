"""What every text goes through before it is used: NFC, and a check that it can be written as UTF-8."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from yaongi.data.permute import scramble

_SURROGATE = re.compile("[\ud800-\udfff]")
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_kept_powers: dict[int, NDArray[np.uint64]] = {}


def normalize(text: str) -> str:
    """`text` in NFC (never NFKC: x² stays x²).

    Raises:
        ValueError: a lone surrogate stands in it; such text has no UTF-8 form.
    """
    found = _SURROGATE.search(text)
    if found:
        raise ValueError(f"text: must hold no lone surrogates, got U+{ord(found[0]):04X} at character {found.start()}")
    return unicodedata.normalize("NFC", text)


def batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Texts in lists that end with the text that reaches `characters`; the last may be shorter."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= characters:
            yield held
            held, size = [], 0
    if held:
        yield held


def pieces(lines: Iterable[str], characters: int) -> Iterator[str]:
    """Lines joined into pieces that end with the line that reaches `characters`; the last may be shorter."""
    return map("".join, batches(lines, characters))


def word_hashes(text: str) -> NDArray[np.uint64]:
    """A 64-bit hash of each word (runs of letters, digits and marks, case folded): (words,).

    A word's hash is the polynomial of its code points in an odd base modulo 2^64, scrambled; with prefix sums over the
    whole text, and the base's inverse to shift each word to the same place, that takes no loop over words.
    """
    points = np.frombuffer(text.casefold().encode("utf-32-le"), np.uint32)  # (characters,)
    inside = np.concatenate(([False], _word_table()[points], [False]))
    starts, ends = np.flatnonzero(inside[1:] & ~inside[:-1]), np.flatnonzero(~inside[1:] & inside[:-1])
    sums = np.zeros(len(points) + 1, np.uint64)
    np.cumsum((points + np.uint64(1)) * _powers(_BASE, len(points)), out=sums[1:])
    return scramble((sums[ends] - sums[starts]) * _powers(_INVERSE, len(points) + 1)[starts])


@cache
def _word_table() -> NDArray[np.bool_]:
    """Whether each code point belongs to words: (0x110000,)."""
    categories = map(unicodedata.category, map(chr, range(0x110000)))
    return np.fromiter((category[0] in "LNM" for category in categories), np.bool_, 0x110000)


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """`base ** i` modulo 2^64 for i below `count`: (count,). The longest so far is kept."""
    known = _kept_powers.get(base)
    if known is None or len(known) < count:
        known = np.full(max(count, 1 << 16), base, np.uint64)
        known[0] = 1
        _kept_powers[base] = np.cumprod(known, out=known)
    return known[:count]


def ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """A 64-bit hash of each run of `n` words, from the hashes of the words: (words - n + 1,) or empty."""
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(n):
        total = scramble(total + words[offset : offset + count] + np.uint64(1))
    return total
