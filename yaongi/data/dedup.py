"""Documents seen before: the same text exactly, or nearly (MinHash over runs of five words, datasketch's index)."""

import hashlib
from functools import cache
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from yaongi.data.text import ngram_hashes

if TYPE_CHECKING:
    from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 64
SHINGLE_WORDS = 5
THRESHOLD = 0.8
_BATCH = 8192


def digest(text: str) -> bytes:
    """16 bytes that two texts share only when they are the same, blank edges aside."""
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()


def signature(words: NDArray[np.uint64]) -> NDArray[Any] | None:
    """The MinHash of a document from the hashes of its words: (64,), or None when it has fewer than five words."""
    shingles = ngram_hashes(words, SHINGLE_WORDS) >> np.uint64(32)
    if not shingles.size:
        return None
    sketch = _blank().copy()
    for start in range(0, len(shingles), _BATCH):
        sketch.update_batch(shingles[start : start + _BATCH].tolist())
    return sketch.hashvalues


class Seen:
    """What came before. Documents must be offered in a fixed order for the choice to be the same again."""

    def __init__(self, *, near: bool = True) -> None:
        """``near``: look for near duplicates too; that costs about 2 kB of memory a document."""
        self._digests: set[bytes] = set()
        self._index = _new_index() if near else None

    def kind(self, key: bytes, sketch: NDArray[Any] | None) -> str | None:
        """``"exact"`` or ``"near"`` for a document seen before; None for a new one, which is then remembered."""
        if key in self._digests:
            return "exact"
        self._digests.add(key)
        if self._index is None or sketch is None:
            return None
        minhash = _blank().copy()
        minhash.hashvalues = sketch
        if self._index.query(minhash):
            return "near"
        self._index.insert(key, minhash, check_duplication=False)
        return None


@cache
def _blank() -> "MinHash":
    """An empty MinHash to copy; making one draws its permutations, which costs more than a signature."""
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, hashfunc=index)


def _new_index() -> "MinHashLSH":
    from datasketch import MinHashLSH

    return MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
