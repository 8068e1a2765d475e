"""Batches of rows from several streams, as a pure function of (seed, sample number). Needs only numpy and torch.

Sample `n` gets its stream from the mixture (`mix.Mixture`). As the `k`-th sample of that stream it belongs to epoch
`k // rows`, and is the row that the epoch's seeded permutation (`permute`) puts at place `k % rows`. So the data of
step 1200 does not depend on the number of processes, workers or micro-batches, nor on what was read before, and the
position of a run is one number.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from yaongi.data.mix import Mixture
from yaongi.data.permute import permute

STATE_VERSION = 1
Row = tuple[NDArray[np.uint16], NDArray[np.int32], NDArray[np.int64] | None]  # ids, document ids and targets, each (L,)


class Rows(Protocol):
    """Rows of one length. Their documents don't decrease and count from 0; targets are None for the next tokens."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Row:
        """Return a row."""


@dataclass(frozen=True)
class RowStream:
    """Rows that are read in one shuffled order; `share` is their part of the rows of a run, on any scale."""

    name: str  # the domain; DOMAIN/SOURCE where a domain has several streams
    domain: str
    share: float
    rows: Rows
    tokens: int


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
        return type(self)(**{name: part.pin_memory() for name, part in parts.items() if part is not None})


@dataclass(frozen=True)
class HeldOut:
    """Fixed rows of a domain's held-out split, for bits per byte."""

    input_ids: torch.Tensor  # (R, L) int64
    document_ids: torch.Tensor  # (R, L) int32
    predicted: torch.Tensor  # (R, L) bool: whether the token counts, that is, is text predicted within its document
    text_bytes: torch.Tensor  # (R,) int64: UTF-8 bytes of the predicted tokens of a row


class RowLoader(ABC):
    """The training order over streams of rows."""

    def __init__(
        self,
        streams: Sequence[RowStream],
        mix: Mapping[str, float],
        *,
        row_tokens: int,
        batch_rows: int,
        seed: int,
        hash: str,
        vocab_size: int,
        unused: Sequence[str] = (),
    ) -> None:
        """Lay out the order.

        Args:
            streams: those of the domains of `mix`.
            mix: the share of each domain.
            row_tokens: L, the length of a row.
            batch_rows: rows per global batch, that is per optimizer step over all processes and micro-batches.
            hash: of all that the rows are made of.
            unused: domains that are there and not in the mix.

        Raises:
            ValueError: a row or a batch would be too small.
        """
        if row_tokens < 2 or batch_rows < 1:
            raise ValueError(
                f"loader: rows must be of 2 tokens or more, in batches of 1 or more, got {row_tokens}, {batch_rows}"
            )
        self.row_tokens, self.batch_rows, self.seed = row_tokens, batch_rows, seed
        self.mix, self.hash, self.vocab_size = dict(mix), hash, vocab_size
        self.domains, self.unused = tuple(mix), tuple(unused)
        self.streams = list(streams)
        self.mixture = Mixture({stream.name: stream.share for stream in streams})
        self._domains = np.array([self.domains.index(stream.domain) for stream in streams])
        self.rows = {stream.name: len(stream.rows) for stream in streams}
        self.tokens = {stream.name: stream.tokens for stream in streams}
        self.samples = 0  # consumed so far by `stream`

    def read(self, samples: Iterable[int]) -> Batch:
        """Read the rows of the given sample numbers (B,); the result does not depend on earlier reads."""
        numbers = np.fromiter(samples, np.int64)
        streams, rows = self.rows_of(numbers)
        found = [self.streams[s].rows.read(row) for s, row in zip(streams.tolist(), rows.tolist(), strict=True)]
        ids, documents, targets = zip(*found, strict=True)
        tokens = np.stack(ids)
        if int(tokens.max()) >= self.vocab_size:
            raise ValueError(f"loader: token ids must be below {self.vocab_size}, got {int(tokens.max())}")
        labels = None
        if any(row is not None for row in targets):
            labels = torch.from_numpy(np.stack([_next_tokens(*row) if row[2] is None else row[2] for row in found]))
        return Batch(
            torch.from_numpy(tokens.astype(np.int64)),
            torch.from_numpy(np.stack(documents)),
            torch.from_numpy(self._domains[streams]),
            torch.from_numpy(numbers),
            labels,
        )

    def rows_of(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return of each sample (B,) its stream's number and its row there."""
        streams, places = self.mixture.locate(samples)
        return streams, self._rows_at(streams, places)

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

    @property
    def measured(self) -> Sequence[str]:
        """The domains whose held-out text shows what a run learns."""
        return self.domains

    @abstractmethod
    def held_out(self, domain: str, rows: int) -> HeldOut:
        """Read rows spread evenly over the domain's held-out split, always the same.

        Args:
            rows: how many; 0, or more than there are: all.

        Raises:
            ValueError: the split is missing or does not fill one row.
        """

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
            details = "; ".join(
                "the rows in --data were others"
                if key == "manifest"
                else f"{key} must be {identity[key]}, got {state.get(key)}"
                for key in differing
            )
            raise ValueError(f"loader: the saved position is of other data ({details})")
        self.samples = int(state["samples"])

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "row_tokens": self.row_tokens,
            "mix": self.mixture.shares,
            "manifest": self.hash,
        }

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


def _next_tokens(ids: NDArray[np.uint16], documents: NDArray[np.int32], _: None = None) -> NDArray[np.int64]:
    """Return the token after each one in its document (L,), -1 where there is none."""
    targets = np.full(len(ids), -1, np.int64)
    targets[:-1] = np.where(documents[1:] == documents[:-1], ids[1:].astype(np.int64), -1)
    return targets
