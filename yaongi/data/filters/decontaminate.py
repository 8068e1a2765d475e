"""Decontamination: a document that shares 13 words in a row with a benchmark item must not be trained on.

Korean questions are often shorter than 13 words. Of an item with 8 to 12 words, all words in a row must match. Items
with fewer words are ignored, because such phrases are too common.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from yaongi.data.sources.files import data_files, file_format
from yaongi.data.sources.readers import read_rows
from yaongi.data.text import ngram_hashes, normalize, word_hashes
from yaongi.files import sha256_file

NGRAM = 13
SHORTEST = 8


class Benchmarks:
    """The word n-grams of the benchmarks: by length, their sorted 64-bit hashes."""

    def __init__(self, items: Iterable[str]) -> None:
        """Hash the n-grams of all items.

        Args:
            items: texts of the benchmarks, each a question, a choice, an answer.
        """
        by_length: dict[int, list[NDArray[np.uint64]]] = {}
        self.items = 0
        for item in items:
            words = word_hashes(normalize(item))
            length = min(NGRAM, len(words))
            if length >= SHORTEST:
                by_length.setdefault(length, []).append(ngram_hashes(words, length))
                self.items += 1
        self._hashes = {length: np.unique(np.concatenate(parts)) for length, parts in sorted(by_length.items())}

    def touches(self, words: NDArray[np.uint64]) -> bool:
        """Return whether a document, given as the hashes of its words, shares an n-gram with an item."""
        for length, known in self._hashes.items():
            grams = ngram_hashes(words, length)
            places = np.minimum(np.searchsorted(known, grams), len(known) - 1)
            if (known[places] == grams).any():
                return True
        return False

    def __bool__(self) -> bool:
        return bool(self._hashes)


def benchmark_items(paths: Sequence[str]) -> Iterator[str]:
    """Yield the items of files and folders: every string of a row, those in lists too; in a .txt file every line.

    Raises:
        FileNotFoundError: a path does not exist or has no readable files.
        ValueError: a file can't be read, or a path has no items.
    """
    for path in paths:
        empty = True
        for file in benchmark_files(path):
            with file.open("rb") as stream:
                for item in row_items(stream, file.name):
                    empty = False
                    yield item
        if empty:
            raise ValueError(f"benchmark: {path} must hold items, got none")


def benchmark_files(path: str) -> list[Path]:
    """Return the files of a benchmark. Raises FileNotFoundError if there are none."""
    if not Path(path).exists():
        wanted = "a file or folder; python -m yaongi.data benchmarks fetches some"
        raise FileNotFoundError(f"benchmark: must be {wanted}, got {path}")
    return data_files(Path(path))[0]


def benchmark_hashes(paths: Sequence[str]) -> list[list[str]]:
    """Return path, file and SHA-256 of each file of the benchmarks; errors as in `benchmark_files`."""
    return [[path, file.name, sha256_file(file)] for path in paths for file in benchmark_files(path)]


def row_items(stream: IO[bytes], name: str) -> Iterator[str]:
    """Yield the items in a file. Raises ValueError if it can't be read."""
    for row in read_rows(stream, name, None):
        if isinstance(row, ValueError):
            raise row
        try:
            items = list(_strings(row))
        except RecursionError:
            raise ValueError(f"benchmark: rows of {name} must not be nested so deeply") from None
        for item in items:
            yield from item.splitlines() if file_format(name) == ".txt" else [item]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part)
