"""The batches of scoring: rows of packed passes, where in them the head is computed, and the forward pass."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from yaongi.model import Yaongi

CHUNK_LOGITS = 1 << 26  # logits in memory at once, in float32 and as many log-probabilities: 0.5 GB
Ints = NDArray[np.int64]
Results = tuple[torch.Tensor, torch.Tensor]  # log-likelihoods (n,) float32 or wider; whether likeliest (n,) bool


@dataclass
class Pass:
    """Tokens that the model reads once, and what is scored in them."""

    tokens: NDArray[np.int32]  # (n,)
    requests: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # of each request, where its first scored token is predicted
    targets: list[NDArray[np.int32]] = field(default_factory=list)

    def add(self, request: int, place: int, targets: NDArray[np.int32]) -> None:
        """Score `targets` from `place` on."""
        self.requests.append(request)
        self.places.append(place)
        self.targets.append(targets)


@dataclass(frozen=True)
class Batch:
    """Rows that are run at once, or in parts; all that is scored of a request lies in one row."""

    input_ids: NDArray[np.int64]  # (R, L)
    document_ids: NDArray[np.int32]  # (R, L)
    places: Ints  # (n,) into the R · L positions, not decreasing: where a scored token is predicted
    targets: Ints  # (n,)
    owners: Ints  # (n,) index into `requests`
    requests: Ints  # (m,)

    @cached_property
    def digest(self) -> str:
        """A hash of all that decides the results, which come in the order of `requests`."""
        found = hashlib.sha256(repr(self.input_ids.shape).encode())
        for array in (self.input_ids, self.document_ids, self.places, self.targets, self.owners):
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    def sums(self, parts: Sequence[Results]) -> tuple[NDArray[np.float64], Ints]:
        """Return the log-likelihood (m,) of each request, and 1 or 0 (m,): whether all its tokens are likeliest."""
        values = np.concatenate([part[0].double().cpu().numpy() for part in parts])
        likeliest = np.concatenate([part[1].cpu().numpy() for part in parts])
        totals, misses = np.zeros(len(self.requests)), np.zeros(len(self.requests), np.int64)
        np.add.at(totals, self.owners, values)
        np.add.at(misses, self.owners, (~likeliest).astype(np.int64))
        return totals, (misses == 0).astype(np.int64)


def make_batches(
    passes: Sequence[Pass], rows: Sequence[Sequence[int]], row_tokens: int, rows_per_batch: int
) -> list[Batch]:
    """Lay the passes out in rows, as `pack` says, and group these.

    Args:
        rows: the passes of each row.
        row_tokens: L.
        rows_per_batch: R; the last batch may have fewer.
    """
    return [
        _batch(passes, rows[start : start + rows_per_batch], row_tokens)
        for start in range(0, len(rows), rows_per_batch)
    ]


def _batch(passes: Sequence[Pass], rows: Sequence[Sequence[int]], row_tokens: int) -> Batch:
    input_ids = np.zeros((len(rows), row_tokens), np.int64)
    document_ids = np.zeros((len(rows), row_tokens), np.int32)
    places, targets, owners = [], [], []
    for row, members in enumerate(rows):
        start = 0
        for number, member in enumerate(members):
            part = passes[member]
            end = start + len(part.tokens)
            input_ids[row, start:end], document_ids[row, start:end] = part.tokens, number
            for request, place, wanted in zip(part.requests, part.places, part.targets, strict=True):
                first = row * row_tokens + start + place
                places.append(np.arange(first, first + len(wanted)))
                targets.append(wanted)
                owners.append(np.full(len(wanted), request))
            start = end
        document_ids[row, start:] = len(members)  # the padding is a document of its own
    nothing = [np.zeros(0, np.int64)]
    where, asked = (np.concatenate(parts or nothing) for parts in (places, owners))
    order = np.argsort(where, kind="stable")
    requests, owner = np.unique(asked[order], return_inverse=True)
    expected: Ints = np.concatenate([part.astype(np.int64) for part in targets] or nothing)[order]
    return Batch(input_ids, document_ids, where[order], expected, owner.astype(np.int64), requests)


def run_batch(model: Yaongi, batch: Batch, first: int, last: int, device: torch.device) -> Results:
    """Run the rows `first` to `last` of a batch and return the results of what is scored there, on the device."""
    rows, length = batch.input_ids[first:last], batch.input_ids.shape[1]
    start, end = np.searchsorted(batch.places, (first * length, last * length))
    where, index = np.unique(batch.places[start:end] - first * length, return_inverse=True)
    sent: list[NDArray[Any]] = [rows, batch.document_ids[first:last], where, index, batch.targets[start:end]]
    input_ids, document_ids, places, items, targets = (to_device(array, device) for array in sent)
    hidden = model.hidden_states(input_ids, document_ids).flatten(0, 1)[places]
    return token_scores(model, hidden, items, targets, index)


def token_scores(
    model: Yaongi, hidden: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, index: Ints
) -> Results:
    """Return the log-probability of each target, and whether it is the likeliest token.

    Args:
        hidden: (p, d), what the head reads.
        items: (n,) int64, not decreasing: the place in `hidden` that predicts each target.
        targets: (n,) int64.
        index: `items` on the host.
    """
    chunk = max(1, CHUNK_LOGITS // model.config.vocab_size)
    values, likeliest = [], []
    for first in range(0, max(1, len(hidden)), chunk):
        start, end = np.searchsorted(index, (first, first + chunk)).tolist()
        logits = model.lm_head(hidden[first : first + chunk])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        mine, wanted = items[start:end] - first, targets[start:end]
        values.append(wide.log_softmax(-1)[mine, wanted])
        likeliest.append(wide.argmax(-1)[mine] == wanted)
    return torch.cat(values), torch.cat(likeliest)


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to the device; a GPU's copy overlaps with its work."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
