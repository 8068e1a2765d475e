"""Sources to token shards, on all cores: normalise to NFC, drop duplicates and benchmark texts, write ids."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yaongi import cli
from yaongi.data.filters import dedup
from yaongi.data.filters.decontaminate import Benchmarks, benchmark_hashes, benchmark_items
from yaongi.data.shards import Shard, ShardSet, ShardWriter
from yaongi.data.sources.files import describe
from yaongi.data.sources.readers import PLAIN, Reading
from yaongi.data.sources.source import TRAIN, VAL, Source, Sources, is_held_out
from yaongi.data.sources.specs import open_sources
from yaongi.data.stages.forecast import SHARD_BYTES, check_disk, duration, size
from yaongi.data.stages.processes import worker_pool
from yaongi.data.stages.shard_folder import built, finished, write_description
from yaongi.data.text import batches, normalize, word_hashes
from yaongi.data.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 19
_USUAL_SPEED = 4e6  # bytes of text per second and core


@dataclass(frozen=True)
class Options:
    """Options that affect the result of `tokenize_sources`."""

    held_out: float = 0.005
    near_duplicates: bool = True
    index_bytes: int = dedup.MOST_BYTES
    benchmarks: tuple[str, ...] = ()
    shard_tokens: int = 100_000_000
    reading: Reading = PLAIN


@dataclass(frozen=True)
class _Document:
    """A worker's result for a document: all but the decision to keep it, which depends on the documents before it."""

    tokens: NDArray[np.int32]
    text_bytes: int
    keys: list[int]  # for `dedup.Seen`
    held_out: bool
    contaminated: bool


class _Worker:
    """A function from texts to `_Document`s; one per process."""

    def __init__(self, model: bytes, benchmarks: Benchmarks, options: Options) -> None:
        self.tokenizer, self.benchmarks, self.options = Tokenizer(model), benchmarks, options

    def __call__(self, texts: Sequence[str]) -> list[_Document]:
        return [self._document(text) for text in map(normalize, texts)]

    def _document(self, text: str) -> _Document:
        near = self.options.near_duplicates
        words = word_hashes(text) if near or self.benchmarks else np.empty(0, np.uint64)
        return _Document(
            tokens=np.array(self.tokenizer.encode(text, eos=True), np.int32),
            text_bytes=len(text.encode()),
            keys=[dedup.exact_key(text), *(dedup.band_keys(words) if near else [])],
            held_out=is_held_out(text, self.options.held_out),
            contaminated=self.benchmarks.touches(words),
        )


def tokenize_sources(
    specs: Sequence[str],
    tokenizer: Tokenizer,
    out: Path,
    options: Options,
    *,
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write the token shards of `specs` (see `sources.specs`) into `out`; do nothing if they are up to date.

    Sources that are held out as a whole come first, so a training document that repeats one is dropped as a duplicate.

    Args:
        workers: processes; 0: one per core. The result does not depend on it.

    Returns:
        The manifest.

    Raises:
        ValueError: a source has no documents, unreadable content or too many bad rows, a benchmark has no items, or
            rensa, which finds near duplicates, is not installed.
        FileNotFoundError: a source or benchmark does not exist, or holds no files that can be read.
        OSError: the disk has no room for the shards.
    """
    if options.near_duplicates:
        cli.require("rensa")
    sources = open_sources(specs, options.reading, say)
    plan = _plan(sources, tokenizer, options)
    if (done := finished(out, plan)) is not None:
        say(f"token shards in {out} are up to date")
        return done
    workers = workers or os.cpu_count() or 1
    _forecast(sources, out, workers, say)
    with built(out) as building:
        _build(sources, tokenizer, building, options, plan, workers, say)
    return ShardSet.open(out).manifest


def _forecast(sources: Sources, out: Path, workers: int, say: Callable[[str], None]) -> None:
    """Say how much there is to do, and check the disk."""
    text = sum(source.bytes for source in sources)
    shards, time = size(text * SHARD_BYTES), duration(text / _USUAL_SPEED / workers)
    say(f"to tokenize: about {size(text)} of text to {shards} of shards, {time} on {workers} cores")
    check_disk("tokenize", out, text * SHARD_BYTES)


def _build(
    sources: Sources,
    tokenizer: Tokenizer,
    folder: Path,
    options: Options,
    plan: dict[str, Any],
    workers: int,
    say: Callable[[str], None],
) -> None:
    if not options.benchmarks:
        say("no --benchmark given: texts that quote benchmarks are NOT dropped")
    if options.near_duplicates:
        say(f"near duplicates found, by the Jaccard similarity of their runs of five words: {dedup.curve()}")
    benchmarks = Benchmarks(benchmark_items(options.benchmarks))
    with worker_pool(_Worker(tokenizer.model, benchmarks, options), workers, "tokenize") as process:
        labels = _labels(sources)
        splits, counts = _write_all(labels, process, folder, tokenizer.vocab_size, options, say)
    if sources.left_out:
        say(describe(sources.left_out))
    write_description(
        folder,
        tokenizer,
        splits,
        benchmark_items=benchmarks.items,
        shares=_shares(sources),
        counts=counts,
        files={label: source.tally.files for label, source in labels.items()},
        left_out=[{"file": name, "reason": reason} for name, reason in sources.left_out],
        plan=plan,
    )


def _plan(sources: Sources, tokenizer: Tokenizer, options: Options) -> dict[str, Any]:
    """Return everything that decides the shards' content, so that a second run can see that nothing has changed."""
    inputs = [[s.domain, s.split, s.name, s.licence, s.share, s.fingerprint()] for s in sources]
    plan = {
        "inputs": inputs,
        "left_out": sources.left_out,
        "tokenizer": tokenizer.hash,
        "dedup": dedup.INDEX_VERSION,
        **asdict(options),
        "benchmarks": benchmark_hashes(options.benchmarks),
    }
    return json.loads(json.dumps(plan))


def _shares(sources: Sequence[Source]) -> dict[str, dict[str, float]]:
    """Return the share of each source of the public mix, by domain."""
    shares: dict[str, dict[str, float]] = {}
    for source in sources:
        if source.share is not None:
            shares.setdefault(source.domain, {})[source.name] = source.share
    return shares


def _labels(sources: Sequence[Source]) -> dict[str, Source]:
    """Return the sources by labels that are all different."""
    labels: dict[str, Source] = {}
    for source in sources:
        name = f"{source.domain}/{source.name}" + (f" ({source.split})" if source.split else "")
        spare = (f"{name} #{number}" for number in count(2))
        labels[next(label for label in chain([name], spare) if label not in labels)] = source
    return labels


def _write_all(
    sources: Mapping[str, Source],
    process: Callable[[Iterator[list[str]]], Iterator[list[_Document]]],
    folder: Path,
    vocab_size: int,
    options: Options,
    say: Callable[[str], None],
) -> tuple[dict[str, dict[str, list[Shard]]], dict[str, dict[str, int]]]:
    seen = dedup.Seen(options.index_bytes)
    splits: dict[str, dict[str, list[Shard]]] = {TRAIN: {}, VAL: {}}
    counts: dict[str, dict[str, int]] = {}
    for number, (label, source) in sorted(enumerate(sources.items()), key=lambda item: item[1][1].split != VAL):
        writers = {
            split: ShardWriter(
                folder,
                f"{split}/{source.domain}-{number:02d}",
                source.name,
                source.licence,
                options.shard_tokens,
                vocab_size,
            )
            for split in (TRAIN, VAL)
        }
        try:
            counts[label] = dict(_write_source(source, process, writers, seen))
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
        for split, writer in writers.items():
            writer.close()
            if writer.shards:
                splits[split].setdefault(source.domain, []).extend(writer.shards)
        say(f"{label}: " + ", ".join(f"{total:,} {name}" for name, total in counts[label].items()))
    if seen.forgets:
        full = f"{options.index_bytes / 1e9:g} GB"
        say(f"the index of duplicates was full at {full} (--index-gb): duplicates far behind each other were NOT found")
    return splits, counts


def _write_source(
    source: Source,
    process: Callable[[Iterator[list[str]]], Iterator[list[_Document]]],
    writers: dict[str, ShardWriter],
    seen: dedup.Seen,
) -> Counter[str]:
    counts: Counter[str] = Counter(dict.fromkeys(("documents", "tokens", "exact", "near", "contaminated"), 0))
    for documents in process(batches(source.documents(), _BATCH_CHARACTERS)):
        splits = [source.split or (VAL if document.held_out else TRAIN) for document in documents]
        clean = [pair for pair in zip(splits, documents, strict=True) if pair[0] == VAL or not pair[1].contaminated]
        counts["contaminated"] += len(documents) - len(clean)
        for (split, document), kind in zip(clean, seen.kinds([document.keys for _, document in clean]), strict=True):
            if kind:
                counts[kind] += 1
                continue
            writers[split].add(document.tokens, document.text_bytes)
            counts["documents"] += 1
            counts["tokens"] += len(document.tokens)
    counts.update({key: source.tally.total(key) for key in ("empty", "bad", "cut")})
    if not counts["documents"]:
        raise ValueError(f"data: source {source.name} of {source.domain} gave no documents ({dict(counts)})")
    return counts
