"""Functions on text: NFC with a check that it can be written as UTF-8, batches, and hashes of words and n-grams."""

import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from yaongi.data.permute import scramble

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_kept_powers: dict[int, NDArray[np.uint64]] = {}


def normalize(text: str) -> str:
    """Return `text` in NFC (never NFKC: x² stays x²).

    Raises:
        ValueError: the text has a lone surrogate, and so no UTF-8 form.
    """
    refuse_surrogates(text)
    return unicodedata.normalize("NFC", text)


def refuse_surrogates(text: str) -> None:
    """Raise ValueError if the text has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise ValueError(f"text: must hold no lone surrogates, got {got}") from error


def batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Yield lists of texts; each list ends with the text that brings it to `characters`, the last may be shorter."""
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
    """Join lines into texts; each ends with the line that brings it to `characters`, the last may be shorter."""
    return map("".join, batches(lines, characters))


def cut(text: str, longest: int) -> list[str]:
    """Return a text in parts of up to `longest` UTF-8 bytes, none of them blank; if it can be, it is cut at blanks."""
    if len(text.encode()) <= longest:
        return [text]
    parts, start, most = [], 0, longest // 4
    while start < len(text):
        end = start + most
        if end < len(text):
            end = 1 + max(text.rfind(blank, start, end) for blank in "\n ")
            end = end if end > start else start + most
        if not (part := text[start:end]).isspace():
            parts.append(part)
        start = end
    return parts


def word_hashes(text: str) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each word (a run of letters, digits and marks, case-folded): (words,).

    A word's hash is a polynomial of its code points in an odd base modulo 2^64, scrambled. Prefix sums over the text,
    and powers of the base's inverse that shift each word to exponent 0, avoid a loop over words.
    """
    points = np.frombuffer(text.casefold().encode("utf-32-le"), np.uint32)  # (characters,)
    inside = np.concatenate(([False], _word_table()[points], [False]))
    starts, ends = np.flatnonzero(inside[1:] & ~inside[:-1]), np.flatnonzero(~inside[1:] & inside[:-1])
    sums = np.zeros(len(points) + 1, np.uint64)
    np.cumsum((points + np.uint64(1)) * _powers(_BASE, len(points)), out=sums[1:])
    return scramble((sums[ends] - sums[starts]) * _powers(_INVERSE, len(points) + 1)[starts])


@cache
def _word_table() -> NDArray[np.bool_]:
    """Return whether each code point belongs to words: (0x110000,)."""
    categories = map(unicodedata.category, map(chr, range(0x110000)))
    return np.fromiter((category[0] in "LNM" for category in categories), np.bool_, 0x110000)


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """Return `base ** i` modulo 2^64 for i below `count`: (count,). The longest array so far is kept."""
    known = _kept_powers.get(base)
    if known is None or len(known) < count:
        known = np.full(max(count, 1 << 16), base, np.uint64)
        known[0] = 1
        _kept_powers[base] = np.cumprod(known, out=known)
    return known[:count]


def ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each run of `n` words, from the hashes of the words: (words - n + 1,) or empty."""
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(n):
        total = scramble(total + words[offset : offset + count] + np.uint64(1))
    return total
