"""Decontamination: a document that shares 13 words in a row with a benchmark item must not be trained on.

Korean questions are often shorter than 13 words. Of an item with 8 to 12 words, all words in a row must match. Items
with fewer words are ignored, because such phrases are too common.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yaongi.data.sources.files import data_files, file_format
from yaongi.data.sources.readers import read_rows
from yaongi.data.text import ngram_hashes, normalize, word_hashes

NGRAM = 13
SHORTEST = 8


@dataclass(frozen=True)
class HubBenchmark:
    """A benchmark on the hub: the configs and splits whose items are excluded from training."""

    id: str
    configs: tuple[str, ...] | None = None  # None: all of them
    splits: tuple[str, ...] | None = None  # None: all of them


HUB_BENCHMARKS: Mapping[str, HubBenchmark] = {
    "kmmlu": HubBenchmark("HAERAE-HUB/KMMLU"),  # its train split too, which must never be trained on
    "haerae": HubBenchmark("HAERAE-HUB/HAE_RAE_BENCH_1.1"),
    "logickor": HubBenchmark("maywell/LogicKor"),
    "gsm8k": HubBenchmark("openai/gsm8k", ("main",), ("test",)),
}


class Benchmarks:
    """The word n-grams of the benchmarks: by length, their sorted 64-bit hashes."""

    def __init__(self, items: Iterable[str]) -> None:
        """Hash the n-grams of all items.

        Args:
            items: texts of the benchmarks, each a question with its choices.
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


def benchmark_texts(names: Sequence[str]) -> Iterator[str]:
    """Yield the items of local files or folders, or of `kmmlu`, `haerae`, `logickor`, `gsm8k` from the hub.

    An item is a row with all its strings joined, those in lists too; in a .txt file it is a line.

    Raises:
        ValueError: a name is neither a path nor a known benchmark, or a benchmark has no items.
    """
    for name in names:
        if Path(name).exists():
            items = _local_items(Path(name))
        elif name in HUB_BENCHMARKS:
            items = _hub_items(HUB_BENCHMARKS[name])
        else:
            raise ValueError(f"benchmark: name must be a path or one of {', '.join(HUB_BENCHMARKS)}, got {name!r}")
        count = 0
        for item in items:
            count += 1
            yield item
        if not count:
            raise ValueError(f"benchmark: {name} holds no items")


def _local_items(path: Path) -> Iterator[str]:
    for file in data_files(path)[0]:
        if file_format(file.name) == ".parquet":
            from pyarrow import parquet

            fields: Sequence[str] = parquet.read_schema(file).names
        else:
            fields = ("text",)
        with file.open("rb") as stream:
            for row in read_rows(stream, file.name, fields):
                if isinstance(row, ValueError):
                    raise row
                item = " ".join(_strings(row))
                yield from item.splitlines() if file_format(file.name) == ".txt" else [item]


def _hub_items(benchmark: HubBenchmark) -> Iterator[str]:
    from datasets import get_dataset_config_names, load_dataset

    for config in benchmark.configs or get_dataset_config_names(benchmark.id):
        for split, rows in load_dataset(benchmark.id, config).items():
            if benchmark.splits is None or split in benchmark.splits:
                yield from (" ".join(_strings(row)) for row in rows)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part)
