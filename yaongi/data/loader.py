"""Batches of packed rows, as a pure function of (seed, sample number). Needs only numpy and torch.

A packed row is `row_tokens` consecutive ids of one stream (`streams`: a domain, or one of its sources); rows don't
overlap, and the few tokens after the last full row are not used. Sample `n` gets its stream from the mixture
(`mix.Mixture`). As the `k`-th sample of that stream it belongs to epoch `k // rows`, and is the row that the epoch's
seeded permutation (`permute`) puts at place `k % rows`. So the data of step 1200 does not depend on the number of
processes, workers or micro-batches, nor on what was read before, and the position of a run is one number.

Documents end with EOS, which belongs to the document that it ends. `document_ids` count from 0 in each row; the model
predicts a token from the tokens before it in the same document.
"""

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from yaongi.data.mix import Mixture, choose_mix
from yaongi.data.permute import permute
from yaongi.data.shards import TOKEN, Shard, ShardSet
from yaongi.data.streams import TokenStream, training_streams

STATE_VERSION = 1


@dataclass(frozen=True)
class Batch:
    """Packed rows: a global batch or a part of it."""

    input_ids: torch.Tensor  # (B, L) int64
    document_ids: torch.Tensor  # (B, L) int32, not decreasing within a row, from 0
    domains: torch.Tensor  # (B,) int64, index into Loader.domains
    samples: torch.Tensor  # (B,) int64, sample numbers
    targets: torch.Tensor | None = None  # (B, L) int64, negative where there is none; None: the next tokens

    def pin_memory(self) -> "Batch":
        """Return the same batch in page-locked memory, so that copies to the GPU overlap with its work."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Batch(**{name: part.pin_memory() for name, part in parts.items() if part is not None})


@dataclass(frozen=True)
class HeldOut:
    """Fixed rows of a domain's held-out split, for bits per byte."""

    input_ids: torch.Tensor  # (R, L) int64
    document_ids: torch.Tensor  # (R, L) int32
    predicted: torch.Tensor  # (R, L) bool: whether the token counts, that is, is text predicted within its document
    text_bytes: torch.Tensor  # (R,) int64: UTF-8 bytes of the predicted tokens of a row


class Loader:
    """The training order over a folder of token shards."""

    def __init__(
        self,
        folder: str | Path,
        *,
        row_tokens: int,
        batch_rows: int,
        seed: int = 0,
        mix: str = "",
        tokenizer_hash: str | None = None,
    ) -> None:
        """Open and check the shards (see `ShardSet.open`).

        Args:
            row_tokens: L, the length of a row.
            batch_rows: rows per global batch, that is per optimizer step over all processes and micro-batches.
            mix: shares of the domains, such as `ko=40,law=20`; if empty, those that `mix.choose_mix` gives.
            tokenizer_hash: hash of the tokenizer that the shards must have been made with; not checked if None.

        Raises:
            FileNotFoundError: there is no manifest, or a file that it lists is missing.
            ValueError: the shards were made with another tokenizer, a file was truncated or changed, or a domain of the
                mix is missing, or a stream does not fill one row.
        """
        if row_tokens < 2 or batch_rows < 1:
            raise ValueError(
                f"loader: rows must be of 2 tokens or more, in batches of 1 or more, got {row_tokens}, {batch_rows}"
            )
        self.shard_set = ShardSet.open(folder, tokenizer_hash=tokenizer_hash)
        self.row_tokens, self.batch_rows, self.seed = row_tokens, batch_rows, seed
        self.mix = choose_mix(mix, self.shard_set.tokens("train"))
        self.domains = tuple(self.mix)
        self.streams = training_streams(self.shard_set, self.mix)
        self.mixture = Mixture({stream.name: stream.share for stream in self.streams})
        self.vocab_size = int(self.shard_set.manifest["vocab_size"])
        self.eos_id = int(self.shard_set.manifest["eos_id"])
        self._streams = [self._open(stream.shards, f"train, {stream.name}") for stream in self.streams]
        self._domains = np.array([self.domains.index(stream.domain) for stream in self.streams])
        self.rows = {name: s.tokens // row_tokens for name, s in zip(self.mixture.names, self._streams, strict=True)}
        self.tokens = {name: s.tokens for name, s in zip(self.mixture.names, self._streams, strict=True)}
        self.samples = 0  # consumed so far by `stream`

    def read(self, samples: Iterable[int]) -> Batch:
        """Read the rows of the given sample numbers (B,); the result does not depend on earlier reads."""
        numbers = np.fromiter(samples, np.int64)
        streams, places = self.mixture.locate(numbers)
        rows = np.empty((len(numbers), self.row_tokens), TOKEN)
        for i, (stream, row) in enumerate(zip(streams.tolist(), self._rows_at(streams, places).tolist(), strict=True)):
            rows[i] = self._streams[stream].read(row * self.row_tokens, self.row_tokens)
        ids, documents = self._pack(rows)
        return Batch(ids, documents, torch.from_numpy(self._domains[streams]), torch.from_numpy(numbers))

    def batch(
        self, step: int, *, rank: int = 0, world_size: int = 1, micro: int = 0, micro_batch: int | None = None
    ) -> Batch:
        """Read micro-batch `micro` of process `rank` in optimizer step `step`, when all steps have `batch_rows` rows.

        Raises:
            ValueError: `batch_rows` is not a multiple of `micro_batch`, there are fewer micro-batches than processes,
                or a number is out of its range.
        """
        share, micro_batch = self._share(rank, world_size, micro_batch)
        if not (0 <= micro < len(share) and step >= 0):
            raise ValueError(f"loader: no step {step}, rank {rank} of {world_size}, micro-batch {micro}")
        first = step * self.batch_rows + share[micro] * micro_batch
        return self.read(range(first, first + micro_batch))

    def micro_batches(self, rank: int, world_size: int, micro_batch: int) -> int:
        """Return how many of a step's micro-batches of `micro_batch` rows process `rank` gets; errors as in `batch`."""
        return len(self._share(rank, world_size, micro_batch)[0])

    def stream(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int | None = None,
        pin_memory: bool = False,
    ) -> Iterator[Batch]:
        """Yield micro-batches from the current position on, without end; a thread reads at least one step ahead.

        `state_dict` counts a step once its last micro-batch has been yielded. Closing the generator ends the thread.
        """
        share, micro_batch = self._share(rank, world_size, micro_batch)
        start = self.samples

        def batches() -> Iterator[Batch]:
            first = start
            while True:
                for micro in share:
                    batch = self.read(range(first + micro * micro_batch, first + (micro + 1) * micro_batch))
                    yield batch.pin_memory() if pin_memory else batch
                first += self.batch_rows

        for number, batch in enumerate(_ahead(batches(), max(4, len(share))), 1):
            self.samples = start + number // len(share) * self.batch_rows
            yield batch

    def skip(self, batches: int) -> range:
        """Leave out the next global batches of the order, and return their sample numbers."""
        first = self.samples
        self.samples += batches * self.batch_rows
        return range(first, self.samples)

    def held_out(self, domain: str, rows: int) -> HeldOut:
        """Read rows spread evenly over the domain's held-out split, always the same.

        Args:
            rows: how many; 0, or more than there are: all.

        Raises:
            ValueError: the split is missing or does not fill one row.
        """
        stream = self._open(self.shard_set.shards("val", domain), f"val, {domain}")
        available = stream.tokens // self.row_tokens
        count = min(rows or available, available)
        wanted = np.arange(count) * available // count
        tokens = np.stack([stream.read(int(row) * self.row_tokens, self.row_tokens) for row in wanted])
        ids, documents = self._pack(tokens)
        predicted = torch.zeros_like(ids, dtype=torch.bool)
        predicted[:, 1:] = (documents[:, 1:] == documents[:, :-1]) & (ids[:, 1:] != self.eos_id)
        sizes = torch.from_numpy(self.shard_set.token_bytes().astype(np.int64))
        return HeldOut(ids, documents, predicted, (sizes[ids] * predicted).sum(1))

    def consumed(self) -> dict[str, int]:
        """Return the number of samples consumed so far per stream."""
        return self.mixture.counts(self.samples)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as a small dict that JSON can hold."""
        return {"samples": self.samples, "consumed": self.consumed(), **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, which may come from another number of processes, micro-batch size or batch size.

        Raises:
            ValueError: the state belongs to other data, another order or another mixture; the message says what
                differs.
        """
        identity = self._identity()
        differing = [key for key in identity if state.get(key) != identity[key]]
        if differing:
            details = "; ".join(f"{key} must be {identity[key]}, got {state.get(key)}" for key in differing)
            raise ValueError(f"loader: the saved position is of other data ({details})")
        self.samples = int(state["samples"])

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "row_tokens": self.row_tokens,
            "mix": self.mixture.shares,
            "manifest": self.shard_set.hash,
        }

    def _open(self, shards: Sequence[Shard], name: str) -> TokenStream:
        stream = TokenStream(self.shard_set, shards)
        if stream.tokens < self.row_tokens:
            wanted = f"fill a row of {self.row_tokens} tokens"
            where = f"{self.shard_set.folder}, {name},"
            raise ValueError(f"loader: {where} must {wanted} (or leave it out by --mix), got {stream.tokens}")
        return stream

    def _share(self, rank: int, world_size: int, micro_batch: int | None) -> tuple[range, int]:
        """Return which of a step's micro-batches process `rank` gets, and the rows of one; by default one a process.

        The shares differ by one micro-batch at most.
        """
        rows = self.batch_rows // world_size if micro_batch is None else micro_batch
        if rows < 1 or self.batch_rows % rows or self.batch_rows // rows < world_size:
            wanted = f"a multiple of {rows} rows, for {world_size} processes or fewer"
            raise ValueError(f"loader: batch_rows must be {wanted}, got {self.batch_rows} rows")
        if not 0 <= rank < world_size:
            raise ValueError(f"loader: rank must be 0 to {world_size - 1}, got {rank}")
        count = self.batch_rows // rows
        return range(count * rank // world_size, count * (rank + 1) // world_size), rows

    def _rows_at(self, streams: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row numbers (B,) at `places` (B,) in the training orders of `streams` (B,)."""
        rows = np.empty_like(places)
        for stream, name in enumerate(self.mixture.names):
            epochs, within = np.divmod(places, self.rows[name])
            for epoch in np.unique(epochs[streams == stream]).tolist():
                here = (streams == stream) & (epochs == epoch)
                rows[here] = permute(within[here], self.rows[name], f"{self.seed}/{name}/{epoch}")
        return rows

    def _pack(self, rows: NDArray[np.uint16]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids (B, L) int64 and document ids (B, L) int32 of rows of tokens (B, L)."""
        if int(rows.max()) >= self.vocab_size:
            raise ValueError(f"loader: token ids must be below {self.vocab_size}, got {int(rows.max())}")
        ends = np.zeros(rows.shape, np.int32)
        ends[:, 1:] = rows[:, :-1] == self.eos_id
        return torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(ends.cumsum(1, dtype=np.int32))


def _ahead(items: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Yield the same items, made by a thread that runs up to `depth` items ahead; its exceptions are raised here."""
    ready: queue.Queue[Batch | BaseException] = queue.Queue(max(1, depth))
    stop = threading.Event()

    def put(item: Batch | BaseException) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="yaongi-loader", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
