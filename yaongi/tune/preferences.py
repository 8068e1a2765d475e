"""Pairs of a chosen and a rejected answer, in rows that hold whole pairs, with what a reference model says of them."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from yaongi.data.chats.rows import NO_TARGET, PREFERENCES, Conversation, PreferenceRows
from yaongi.data.packing import pack
from yaongi.data.permute import permute
from yaongi.data.row_loader import Batch, HeldOut, RowLoader, RowStream
from yaongi.data.shards import TOKEN
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.scoring import Request, Scorer
from yaongi.files import read_json, sha256_file, write_json
from yaongi.model import Yaongi
from yaongi.model.hub.checkpoint_folders import find_weights
from yaongi.world import World

Scores = NDArray[np.float64]  # (pairs, 2): the log-probabilities of the chosen and of the rejected answer


@dataclass(frozen=True)
class PairBatch(Batch):
    """Rows of pairs: documents 2p and 2p + 1 of a row are the chosen and the rejected answer of its pair p."""

    pairs: torch.Tensor | None = None  # (B,) int64, pairs in each row
    reference: torch.Tensor | None = None  # (B, P, 2) float64, the reference's log-probabilities; 0 where no pair is


class PairRows:
    """The pairs of a split, packed into rows."""

    def __init__(self, pairs: PreferenceRows, row_tokens: int) -> None:
        """Pack the pairs. Raises ValueError if one is longer than a row."""
        self._pairs, self._row_tokens = pairs, row_tokens
        lengths = pairs.conversations.lengths.reshape(-1, 2).sum(1)
        if int(lengths.max()) > row_tokens:
            longest = int(lengths.max())
            raise ValueError(f"tune: --row-tokens must be {longest} or more, as long as a pair, got {row_tokens}")
        order = permute(np.arange(len(lengths)), len(lengths), pairs.split)
        self.members = [order[row] for row in pack(lengths[order].tolist(), row_tokens)]  # the pairs of each row
        self.most = max(map(len, self.members))

    def __len__(self) -> int:
        return len(self.members)

    def read(self, row: int) -> tuple[NDArray[np.uint16], NDArray[np.int32], NDArray[np.int64]]:
        """Return ids, document ids and targets of a row, each (L,)."""
        ids = np.zeros(self._row_tokens, TOKEN)
        documents = np.full(self._row_tokens, 2 * len(self.members[row]), np.int32)
        targets = np.full(self._row_tokens, NO_TARGET, np.int64)
        start = document = 0
        for number in self.members[row].tolist():
            for answer in self._pairs.pair(number):
                end = start + len(answer.ids)
                ids[start:end], documents[start:end] = answer.ids, document
                targets[start : end - 1] = np.where(answer.mask[1:], answer.ids[1:].astype(np.int64), NO_TARGET)
                start, document = end, document + 1
        return ids, documents, targets


class PairLoader(RowLoader):
    """The training order over pairs of answers."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, row_tokens: int, batch_rows: int, seed: int) -> None:
        """Open and check a folder of preferences; arguments and errors as in `ChatLoader`."""
        self.preferences = PreferenceRows(folder, "train", tokenizer_hash=tokenizer.hash)
        self.pairs = PairRows(self.preferences, row_tokens)
        self.reference: Scores | None = None  # to be set before a batch is read
        super().__init__(
            [RowStream(PREFERENCES, PREFERENCES, 1.0, self.pairs, len(self.pairs) * row_tokens)],
            {PREFERENCES: 1.0},
            row_tokens=row_tokens,
            batch_rows=batch_rows,
            seed=seed,
            hash=self.preferences.hash,
            vocab_size=tokenizer.vocab_size,
        )

    @property
    def measured(self) -> Sequence[str]:
        """None: pairs are compared, not predicted."""
        return ()

    def held_out(self, domain: str, rows: int) -> HeldOut:
        """Raise ValueError: pairs are no text."""
        raise ValueError(f"tune: held-out text must be of conversations, got {domain}")

    def held_out_pairs(self) -> PreferenceRows:
        """Open the held-out pairs. Raises ValueError if there are none."""
        return PreferenceRows(self.preferences.shard_set.folder, "val")

    def read(self, samples: Iterable[int]) -> PairBatch:
        """Read rows of pairs with their reference."""
        assert self.reference is not None
        batch = super().read(samples)
        _, rows = self.rows_of(batch.samples.numpy())
        pairs = np.array([len(self.pairs.members[row]) for row in rows])
        reference = np.zeros((len(rows), self.pairs.most, 2))
        for place, row in enumerate(rows):
            reference[place, : pairs[place]] = self.reference[self.pairs.members[row]]
        parts = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
        return PairBatch(**parts, pairs=torch.from_numpy(pairs), reference=torch.from_numpy(reference))


def score_pairs(scorer: Scorer, pairs: PreferenceRows) -> Scores:
    """Return the log-probabilities of all answers, in nats, each the sum over what is learnt of it."""
    requests: list[Request] = []
    owners: list[int] = []
    for number in range(pairs.pairs):
        for side, answer in enumerate(pairs.pair(number)):
            for request in learnt_parts(answer):
                requests.append(request)
                owners.append(2 * number + side)
    totals = np.zeros(2 * pairs.pairs)
    np.add.at(totals, owners, [score.log_likelihood for score in scorer.score(requests)])
    return totals.reshape(-1, 2)


def learnt_parts(answer: Conversation) -> list[Request]:
    """Return a request for each stretch of ids that are learnt, after all that precedes it."""
    mask = answer.mask.copy()
    mask[0] = False  # nothing precedes it
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    ids = answer.ids.tolist()
    return [Request(ids[:start], ids[start:end]) for start, end in edges.tolist()]


def reference_scores(
    init: Path, pairs: PreferenceRows, world: World, dtype: torch.dtype, say: Callable[[str], None]
) -> Scores:
    """Return what the model in `init` says of the pairs: computed once, and kept beside them under its hash.

    Raises:
        OSError: the folder of the pairs can't be written to.
        ValueError: what was kept is no JSON.
    """
    folder = find_weights(init)
    path = pairs.shard_set.folder / f"reference-{pairs.split}-{_hash(folder, dtype)[:16]}.json"
    found = read_json(path) if path.is_file() else {}
    if world.all(found.get("pairs") == pairs.hash):
        return np.array(found["scores"])
    say(f"the reference's log-probabilities of {pairs.pairs:,} pairs ({pairs.split}) are computed once")
    model = Yaongi.from_pretrained(folder, dtype=dtype, device=world.device).eval()
    scores = score_pairs(Scorer(model, world, longest=pairs.longest, say=say), pairs)
    if world.is_main:
        write_json(path, {"pairs": pairs.hash, "scores": scores.tolist()})
    world.barrier()
    return scores


def _hash(folder: Path, dtype: torch.dtype) -> str:
    """Return a hash of a folder's weights and of the dtype in which they are used."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.distcp")])
    return hashlib.sha256(" ".join([str(dtype), *map(sha256_file, files)]).encode()).hexdigest()
