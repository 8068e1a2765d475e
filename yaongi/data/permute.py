"""A stateless shuffle: the row number at place `i` of an epoch, computed for any `i` independently.

A balanced Feistel network permutes the numbers below the next power of four. Numbers outside the range are sent through
again until they fall inside it (cycle walking; J. Black and P. Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
2002). Each step is a bijection, so the result is a permutation. No table is kept, and every place costs about the same.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def permute(places: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """Return the rows (n,) at `places` (n,) in the permutation of `range(size)` that `key` determines.

    Raises:
        ValueError: a place is outside `range(size)`.
    """
    if places.size and not 0 <= int(places.min()) <= int(places.max()) < size:
        raise ValueError(f"permute: places must be 0 to {size - 1}, got {int(places.min())} to {int(places.max())}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    digest = hashlib.sha256(key.encode()).digest() + hashlib.sha256(key.encode() + b"+").digest()
    keys = np.frombuffer(digest, np.uint64)[:_ROUNDS]
    rows = _feistel(places.astype(np.uint64), half, keys)
    while (outside := rows >= np.uint64(size)).any():
        rows[outside] = _feistel(rows[outside], half, keys)
    return rows.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Send numbers of `2 * half` bits through the network once."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (scramble(right + key) & mask)
    return (left << bits) | right


def scramble(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of splitmix64, a bijection of 64-bit numbers."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
