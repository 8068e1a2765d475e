"""Fetch the benchmarks whose texts must not be trained on, a file each, for `tokenize --benchmark`."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from yaongi.data.filters.decontaminate import row_items
from yaongi.data.sources.hub import HubSource, Repository
from yaongi.data.sources.patience import Patience, unavailable_errors
from yaongi.data.stages.download import Places
from yaongi.files import write_atomically


@dataclass(frozen=True)
class Benchmark:
    """A benchmark on the hub: all of its subsets, or those named, and the splits that are asked or shown."""

    id: str
    subsets: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("test",)  # empty: all of them


BENCHMARKS: Mapping[str, Benchmark] = {
    "kmmlu": Benchmark("HAERAE-HUB/KMMLU", splits=()),  # its train split too, which must never be trained on
    "haerae": Benchmark("HAERAE-HUB/HAE_RAE_BENCH"),  # which lm-eval scores
    "haerae_1.1": Benchmark("HAERAE-HUB/HAE_RAE_BENCH_1.1"),
    "kobest": Benchmark("skt/kobest_v1", splits=("validation", "test")),
    "hrm8k": Benchmark("HAERAE-HUB/HRM8K"),
    "gsm8k": Benchmark("openai/gsm8k", subsets=("main",)),
    "humaneval": Benchmark("openai/openai_humaneval"),
    "mbpp": Benchmark("google-research-datasets/mbpp", splits=("prompt", "validation", "test")),
    "logickor": Benchmark("maywell/LogicKor", splits=()),
}


def fetch_benchmarks(out: Path, places: Places, say: Callable[[str], None] = print) -> list[str]:
    """Write the items of each benchmark to `out/NAME.jsonl`, unless it is there; one that can't be had is said.

    Returns:
        The names of those that are there.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for name, benchmark in BENCHMARKS.items():
        path = out / f"{name}.jsonl"
        if not path.exists():
            try:
                items, revision = Patience(benchmark.id, say, places.sleep)(partial(_fetched, benchmark, places))
            except unavailable_errors() as error:
                say(f"benchmark {name}: NOT fetched, texts that quote it stay: {' '.join(str(error).split())}")
                continue
            rows = (json.dumps({"text": item}, ensure_ascii=False) + "\n" for item in items)
            write_atomically(path, "".join(rows).encode())
            say(f"benchmark {name}: {len(items):,} items of {benchmark.id} at {revision}")
        found.append(name)
    return found


def _fetched(benchmark: Benchmark, places: Places) -> tuple[list[str], str]:
    """Return the items of a benchmark, each once, and its revision."""
    repository = places.repository(HubSource("", 0, benchmark.id), None)
    return list(dict.fromkeys(_items(benchmark, repository))), repository.revision


def _items(benchmark: Benchmark, repository: Repository) -> Iterator[str]:
    """Yield the items of a benchmark. Raises ValueError if it has none."""
    empty = True
    for subset in benchmark.subsets or repository.subsets():
        for split, files in repository.splits(subset).items():
            if not benchmark.splits or split in benchmark.splits:
                for file in files:
                    with repository.open(file) as stream:
                        for item in row_items(stream, file):
                            empty = False
                            yield item
    if empty:
        raise ValueError(f"no items in {benchmark.id}, {', '.join(benchmark.splits) or 'any split'}")
