"""What every text goes through before it is used: NFC, and a check that it can be written as UTF-8."""

import re
import unicodedata
import zlib

import numpy as np
from numpy.typing import NDArray

from yaongi.data.permute import scramble

_SURROGATE = re.compile("[\ud800-\udfff]")
_WORD = re.compile(r"\w+")


def normalize(text: str) -> str:
    """``text`` in NFC (never NFKC: x² stays x²).

    Raises:
        ValueError: a lone surrogate stands in it; such text has no UTF-8 form.
    """
    found = _SURROGATE.search(text)
    if found:
        raise ValueError(f"text: wanted no lone surrogates, got U+{ord(found[0]):04X} at character {found.start()}")
    return unicodedata.normalize("NFC", text)


def word_hashes(text: str) -> NDArray[np.uint64]:
    """A 64-bit hash of each word (runs of letters and digits, case folded): (words,)."""
    words = [word.encode() for word in _WORD.findall(text.casefold())]
    low = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    high = np.fromiter(map(zlib.adler32, words), np.uint64, len(words))
    return scramble(low | (high << np.uint64(32)))


def ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """A 64-bit hash of each run of ``n`` words, from the hashes of the words: (words - n + 1,) or empty."""
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(n):
        total = scramble(total + words[offset : offset + count] + np.uint64(1))
    return total
