"""A set of 64-bit keys in 4 bytes each: open addressing with linear probing, over whole arrays of keys at once.

A key's low bits name its place in a table, its high bits are what is stored there. A table is never filled above 60 %;
then one twice as large is added, and a key is looked up in all. A key that was never added is taken for a known one
with a probability of about 1e-9 per table. Tables that would not fit into the memory allowed make the oldest ones go.
"""

import numpy as np
from numpy.typing import NDArray

_FIRST_SLOTS = 1 << 21
_FULL = 0.6
_SLOT_BYTES = 4


class Fingerprints:
    """The set; it grows by tables, the newest first, and forgets the oldest keys where it would exceed `most_bytes`."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._tables = most_bytes, list[_Table]()
        self._next = _FIRST_SLOTS
        self._largest = 1 << (most_bytes // (2 * _SLOT_BYTES)).bit_length() - 1  # so that two tables fit
        self.forgets = False  # whether keys were forgotten

    @property
    def bytes(self) -> int:
        """The memory of all tables."""
        return sum(table.bytes for table in self._tables)

    def has(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return which of `keys` (n,) were added: (n,)."""
        found = np.zeros(len(keys), np.bool_)
        for table in self._tables:
            found |= table.has(keys)
        return found

    def add(self, keys: NDArray[np.uint64]) -> None:
        """Add `keys` (n,)."""
        while len(keys):
            if not self._tables or not self._tables[0].room:
                self._grow()
            here = keys[: self._tables[0].room]
            self._tables[0].add(here)
            keys = keys[len(here) :]

    def _grow(self) -> None:
        slots = min(self._next, self._largest)
        while self._tables and self.bytes + slots * _SLOT_BYTES > self._most_bytes:
            self._tables.pop()
            self.forgets = True
        self._tables.insert(0, _Table(slots))
        self._next = 2 * slots


class _Table:
    def __init__(self, slots: int) -> None:
        self._tags = np.zeros(slots, np.uint32)  # 0: free
        self._last = np.uint64(slots - 1)
        self.bytes = self._tags.nbytes
        self.room = int(slots * _FULL)

    def has(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        places, tags = self._split(keys)
        found = np.zeros(len(keys), np.bool_)
        asked = np.arange(len(keys))
        while asked.size:
            here = self._tags[places]
            found[asked[here == tags]] = True
            on = (here != 0) & (here != tags)
            asked, tags, places = asked[on], tags[on], places[on] + np.uint64(1) & self._last
        return found

    def add(self, keys: NDArray[np.uint64]) -> None:
        self.room -= len(keys)
        places, tags = self._split(keys)
        while tags.size:
            free = self._tags[places] == 0
            self._tags[places[free]] = tags[free]  # of several tags for one place the last stays
            on = self._tags[places] != tags
            tags, places = tags[on], places[on] + np.uint64(1) & self._last

    def _split(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """Return the first place of each key, and what is stored for it, which is never 0."""
        return keys & self._last, (keys >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
