"""Deduplication: documents seen before, exactly, or nearly by MinHash over runs of five words.

A signature of 144 minima (rensa) is cut into 18 bands of 8; two documents are near duplicates if they agree in a band,
which those of Jaccard similarity s do with probability 1 - (1 - s^8)^18 (`found`). Of what was seen, 4 bytes per band
are kept (`fingerprints`): 130 to 220 bytes per document. So of new documents one in a million is taken for a seen one;
the order of the documents alone decides which are kept.
"""

import hashlib
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from yaongi.data.filters.fingerprints import Fingerprints
from yaongi.data.permute import scramble
from yaongi.data.text import ngram_hashes

BANDS, ROWS = 18, 8
SHINGLE_WORDS = 5
MOST_BYTES = 8_000_000_000  # for what was seen: some 40 million documents
INDEX_VERSION = 2  # another number, another choice of documents
_SEED = 42


def found(similarity: float) -> float:
    """Return the probability that a near duplicate of this Jaccard similarity is found."""
    return 1 - (1 - similarity**ROWS) ** BANDS


def curve() -> str:
    """Return the probabilities for several similarities, as one line."""
    return ", ".join(f"{found(s):.1%} at {s:g}" for s in (0.5, 0.6, 0.7, 0.8, 0.9))


def exact_key(text: str) -> int:
    """Return 64 bits that two texts share only if they are equal up to surrounding white space."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


def band_keys(words: NDArray[np.uint64]) -> list[int]:
    """Return 64 bits for each band of a document, from the hashes of its words; none for fewer than five words."""
    from rensa import RMinHash

    shingles = ngram_hashes(words, SHINGLE_WORDS)
    if not shingles.size:
        return []
    rows = RMinHash.digest_matrix_from_flat_token_hashes(shingles, [0, len(shingles)], BANDS * ROWS, _SEED).to_rows()
    keys = np.arange(BANDS, dtype=np.uint64)
    for column in np.array(rows, np.uint64).reshape(BANDS, ROWS).T:
        keys = scramble(keys + column + np.uint64(1))
    return keys.tolist()


class Seen:
    """The documents seen so far. The first of several duplicates is kept, so a fixed order gives a fixed result.

    In `most_bytes` of memory: where they are full, duplicates of what was seen longest ago are not found any more.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._known = Fingerprints(most_bytes)

    @property
    def forgets(self) -> bool:
        """Whether documents were forgotten, because the memory was full."""
        return self._known.forgets

    def kinds(self, documents: Sequence[Sequence[int]]) -> list[str | None]:
        """Return "exact" or "near" for each document seen before; None for a new one, which is then remembered.

        Args:
            documents: in order; each its `exact_key`, and then its `band_keys` if near duplicates matter.
        """
        keys = np.fromiter(chain.from_iterable(documents), np.uint64)
        before = self._known.has(keys)
        found: list[str | None] = []
        now: set[int] = set()  # keys of the documents of this call
        start = 0
        for document in documents:
            hits = before[start : start + len(document)]
            start += len(document)
            if hits[0] or document[0] in now:
                found.append("exact")
                continue
            near = hits.any() or not now.isdisjoint(document[1:])
            found.append("near" if near else None)
            now.update(document[:1] if near else document)
        self._known.add(np.fromiter(now, np.uint64, len(now)))
        return found
