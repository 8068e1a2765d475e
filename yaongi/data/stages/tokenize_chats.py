"""Conversations to shards of ids and masks: of any format, fitted into rows, each once, without benchmark texts."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from yaongi.data.chats.encode import Encoded, TrainOn, encode_header
from yaongi.data.chats.fitting import Loss, TooLong, count_targets, fit_pair, fit_talk
from yaongi.data.chats.formats import PREFERENCE, Talk, find_format, read_talks
from yaongi.data.chats.rows import CHAT, PREFERENCES
from yaongi.data.chats.template import ANSWER, CHAT_TEMPLATE
from yaongi.data.filters.decontaminate import Benchmarks, benchmark_hashes, benchmark_items
from yaongi.data.shards import TOKEN, Shard, ShardSet, ShardWriter
from yaongi.data.sources.row_sources import RowSource
from yaongi.data.sources.source import TRAIN, VAL, is_held_out
from yaongi.data.stages.chat_counts import ChatCounts
from yaongi.data.stages.processes import worker_pool
from yaongi.data.stages.shard_folder import built, finished, write_description
from yaongi.data.text import normalize, word_hashes
from yaongi.data.tokenizer import Tokenizer

VERSION = 1  # another number, other shards from the same rows
_BATCH_ROWS = 256


@dataclass(frozen=True)
class ChatOptions:
    """Options that affect the result of `tokenize_chats`."""

    row_tokens: int = 4096
    train_on: TrainOn = "answers"
    too_long: TooLong = "turns"
    held_out: float = 0.01
    benchmarks: tuple[str, ...] = ()
    shard_tokens: int = 100_000_000


class _Row(NamedTuple):
    """A row of a source."""

    where: str
    format: str
    values: dict[str, Any]


class _Part(NamedTuple):
    """A conversation as it is written."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    text_bytes: int  # of what is learnt


@dataclass(frozen=True)
class _Chat:
    """A worker's result for a row: all but the decision to keep it, which depends on the rows before it."""

    parts: tuple[_Part, ...]  # one conversation; or the chosen and the rejected one; or nothing
    losses: tuple[Loss, ...]
    turns: int  # of what is kept
    targets: int
    key: bytes  # equal for duplicates
    held_out: bool
    contaminated: bool


class _Worker:
    """A function from rows to `_Chat`s; one per process."""

    def __init__(self, model: bytes, benchmarks: Benchmarks, options: ChatOptions) -> None:
        self.tokenizer, self.benchmarks, self.options = Tokenizer(model), benchmarks, options
        self._byte_lengths = self.tokenizer.byte_lengths

    def __call__(self, rows: Sequence[_Row]) -> list[_Chat]:
        return [self._chat(row) for row in rows]

    def _chat(self, row: _Row) -> _Chat:
        options = self.options
        try:
            talks = read_talks(row.values, row.format)
            if row.format == PREFERENCE:
                kept, losses = fit_pair(talks, self.tokenizer, options.row_tokens, options.too_long)
            else:
                fit = options.row_tokens, options.train_on, options.too_long
                kept, losses = fit_talk(talks[0], self.tokenizer, *fit)
            text = normalize("\n".join(message["content"] for talk in talks for message in talk))
        except ValueError as error:
            raise ValueError(f"chat: {row.where}: {str(error).removeprefix('chat: ')}") from error
        ids = np.array([token for encoded in kept for token in encoded.ids], TOKEN)
        return _Chat(
            tuple(map(self._part, kept)),
            losses,
            sum(map(len, talks)) - sum(loss.turns for loss in losses),
            sum(map(count_targets, kept)),
            blake2b(ids.tobytes(), digest_size=8).digest(),
            is_held_out(_question(talks[0]), options.held_out),
            bool(kept) and bool(self.benchmarks) and self.benchmarks.touches(word_hashes(text)),
        )

    def _part(self, encoded: Encoded) -> _Part:
        ids, mask = np.array(encoded.ids, np.int32), np.array(encoded.mask)
        return _Part(ids, mask, int(self._byte_lengths[ids[1:]][mask[1:]].sum()))


def tokenize_chats(
    sources: Sequence[RowSource],
    tokenizer: Tokenizer,
    out: Path,
    options: ChatOptions,
    *,
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write the conversations of sources into `out`; do nothing if they are up to date.

    What is held out is chosen by the question before the first answer, so conversations that ask the same are in the
    same split. Sources that are held out as a whole come first; a conversation that was there before is left out.

    Args:
        workers: processes; 0: one per core. The result does not depend on it.

    Returns:
        The manifest.

    Raises:
        ValueError: a row has no known format or another than the rows before it, a message is wrong, or no conversation
            is left to learn from.
        FileNotFoundError: a benchmark does not exist.
    """
    kind = _kind(sources)
    _check(options, kind)
    plan = _plan(sources, tokenizer, options)
    if (done := finished(out, plan, kind)) is not None:
        say(f"conversations in {out} are up to date")
        return done
    if not options.benchmarks:
        say("no --benchmark given: conversations that quote benchmarks are NOT dropped")
    benchmarks = Benchmarks(benchmark_items(options.benchmarks))
    counts = ChatCounts(kind)
    worker = _Worker(tokenizer.model, benchmarks, options)
    with built(out) as folder:
        with worker_pool(worker, workers or os.cpu_count() or 1, "chat") as process:
            splits = _write_all(sources, kind, process, folder, tokenizer.vocab_size, options.shard_tokens, counts)
        if not splits[TRAIN]:
            raise ValueError(f"chat: sources must hold {counts.what} to learn from, got none: {counts.summary()}")
        write_description(
            folder,
            tokenizer,
            splits,
            kind=kind,
            row_tokens=options.row_tokens,
            train_on=options.train_on,
            answer_header=encode_header(ANSWER, tokenizer),
            chat_template=CHAT_TEMPLATE,
            benchmark_items=benchmarks.items,
            counts=counts.table(),
            plan=plan,
        )
    for line in counts.lines():
        say(line)
    return ShardSet.open(out, kind=kind).manifest


def _check(options: ChatOptions, kind: str) -> None:
    if options.row_tokens < 8:
        raise ValueError(f"chat: --row-tokens must be 8 or more, got {options.row_tokens}")
    if not 0 <= options.held_out < 1:
        raise ValueError(f"chat: --val must be a share from 0 to 1, got {options.held_out:g}")
    if kind == PREFERENCES and options.train_on != "answers":
        raise ValueError(f"chat: --train-on must be answers for preferences, got {options.train_on}")


def _kind(sources: Sequence[RowSource]) -> str:
    """Return what the first row holds. Raises ValueError if there is no row."""
    for source in sources:
        for row in _rows(source):
            return PREFERENCES if row.format == PREFERENCE else CHAT
    raise ValueError("chat: sources must hold rows, got none")


def _plan(sources: Sequence[RowSource], tokenizer: Tokenizer, options: ChatOptions) -> dict[str, Any]:
    """Return everything that decides the shards' content, so that a second run can see that nothing has changed."""
    inputs = [[s.name, s.split, s.licence, [[Path(f.name).name, f.fingerprint()] for f in s.files]] for s in sources]
    benchmarks = benchmark_hashes(options.benchmarks)
    plan = {"version": VERSION, "inputs": inputs, "tokenizer": tokenizer.hash, **asdict(options)}
    return json.loads(json.dumps(plan | {"benchmarks": benchmarks}))


def _rows(source: RowSource) -> Iterator[_Row]:
    """Yield the rows of a source. Raises ValueError for one that has no known format, or another than its file."""
    for file in source.files:
        expected = ""
        for number, row in enumerate(file.rows()):
            where = f"{file.name}, row {number}"
            if isinstance(row, ValueError):
                raise row
            try:
                found = find_format(row)
            except ValueError as error:
                raise ValueError(f"chat: {where}: {str(error).removeprefix('chat: ')}") from error
            expected = expected or found
            if found != expected:
                raise ValueError(f"chat: {where}: a file must hold rows of one format, {expected}, got {found}")
            yield _Row(where, found, row)


def _write_all(
    sources: Sequence[RowSource],
    kind: str,
    process: Callable[[Iterator[list[_Row]]], Iterator[list[_Chat]]],
    folder: Path,
    vocab_size: int,
    shard_tokens: int,
    counts: ChatCounts,
) -> dict[str, dict[str, list[Shard]]]:
    seen: set[bytes] = set()
    splits: dict[str, dict[str, list[Shard]]] = {TRAIN: {}, VAL: {}}
    for number, source in sorted(enumerate(sources), key=lambda item: item[1].split != VAL):
        writers = {
            split: ShardWriter(
                folder, f"{split}/{kind}-{number:02d}", source.name, source.licence, shard_tokens, vocab_size
            )
            for split in (TRAIN, VAL)
        }
        for chats in process(_batches(_of_kind(_rows(source), kind))):
            for chat in chats:
                split = source.split or (VAL if chat.held_out else TRAIN)
                if _keep(chat, split, seen, counts):
                    for part in chat.parts:
                        writers[split].add(part.ids, part.text_bytes, part.mask)
        for split, writer in writers.items():
            writer.close()
            if writer.shards:
                splits[split].setdefault(kind, []).extend(writer.shards)
    return splits


def _batches(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield batch


def _of_kind(rows: Iterator[_Row], kind: str) -> Iterator[_Row]:
    for row in rows:
        if (row.format == PREFERENCE) != (kind == PREFERENCES):
            raise ValueError(f"chat: {row.where}: must be {kind}, as the first row is, got {row.format}")
        yield row


def _keep(chat: _Chat, split: str, seen: set[bytes], counts: ChatCounts) -> bool:
    """Return whether a row's conversation is written, and count it."""
    for loss in chat.losses:
        counts.lose(loss)
    if not chat.parts:
        return False
    if chat.contaminated and split == TRAIN:
        counts.lose(Loss("quotes a benchmark", 1, chat.turns, chat.targets))
        return False
    if chat.key in seen:
        counts.lose(Loss("duplicate", 1, chat.turns, chat.targets))
        return False
    seen.add(chat.key)
    counts.keep(split, chat.turns, chat.targets)
    return True


def _question(talk: Talk) -> str:
    """Return what is asked before the first answer, without differences in blanks."""
    before = takewhile(lambda message: message["role"] != ANSWER, talk)
    return normalize(" ".join(word for message in before for word in message["content"].split()))
