"""Rows of conversations for tuning, and pairs of answers for preferences, as `python -m yaongi.data chat` writes them.

Whole conversations are packed into rows when a folder is opened: those of a seeded window of the split by best fit, the
longest first. So the rows are the same for any number of processes, and an epoch is a permutation of them. Each
conversation is a document of its own, and so is the padding at the end of a row. A position's target is the next id of
its conversation where that is learnt.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from yaongi.data.packing import pack
from yaongi.data.permute import permute
from yaongi.data.pieces import CONTROL_PIECES
from yaongi.data.shards import TOKEN, ShardSet

CHAT, PREFERENCES = "chat", "preferences"  # kinds of folders; each holds one domain of that name
NO_TARGET = -1  # as in `model.losses`
_PAD = CONTROL_PIECES.index("<|pad|>")
_WINDOW = 1 << 14  # conversations that are packed together


class Conversation(NamedTuple):
    """A conversation's ids, and which of them are learnt."""

    ids: NDArray[np.uint16]  # (n,)
    mask: NDArray[np.bool_]  # (n,)


class ChatRow(NamedTuple):
    """A packed row."""

    ids: NDArray[np.uint16]  # (L,)
    documents: NDArray[np.int32]  # (L,), from 0, not decreasing
    targets: NDArray[np.int64]  # (L,), the id to predict after each position; NO_TARGET where there is none


class Conversations:
    """The conversations of a split, in the order in which they were written."""

    def __init__(self, shard_set: ShardSet, split: str) -> None:
        """Open the files. Raises ValueError if the split has none, or a conversation of which nothing is learnt."""
        shards = shard_set.shards(split, shard_set.manifest["kind"])
        if not shards:
            raise ValueError(f"chat: {shard_set.folder} must hold conversations in its split {split!r}, got none")
        self._ids = [np.memmap(shard_set.folder / shard.file, TOKEN, "r") for shard in shards]
        self._masks = [np.memmap(shard_set.folder / str(shard.mask), np.uint8, "r") for shard in shards]
        ends = [shard_set.index(shard)[:, 0].astype(np.int64) for shard in shards]
        self._shards = np.repeat(np.arange(len(shards)), [len(part) for part in ends])
        self._starts = np.concatenate([np.concatenate(([0], part[:-1])) for part in ends])  # in its shard
        self.lengths = np.concatenate(ends) - self._starts  # (conversations,)
        starts = [self._starts[self._shards == number] for number in range(len(shards))]
        self.targets = np.concatenate([_count_targets(*part) for part in zip(self._masks, starts, strict=True)])
        if not self.targets.all():  # else no row is without a target, and so no batch
            where = f"number {int(self.targets.argmin())} of {shard_set.folder}, split {split!r}"
            made = "python -m yaongi.data chat leaves such a one out"
            raise ValueError(f"chat: of each conversation an id must be learnt, got none in {where}; {made}")

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> Conversation:
        """Read a conversation."""
        shard, start = int(self._shards[number]), int(self._starts[number])
        end = start + int(self.lengths[number])
        bits = np.unpackbits(self._masks[shard][start // 8 : -(-end // 8)], bitorder="little")
        return Conversation(np.array(self._ids[shard][start:end]), bits[start % 8 :][: end - start].astype(np.bool_))


class ChatRows:
    """The packed rows of a split."""

    def __init__(self, folder: str | Path, split: str, row_tokens: int, *, tokenizer_hash: str | None = None) -> None:
        """Open and check a folder (see `ShardSet.open`), and pack its conversations.

        Args:
            split: `train` or `val`.
            row_tokens: L, the length of a row.
            tokenizer_hash: hash of the tokenizer that the folder must have been made with; not checked if None.

        Raises:
            FileNotFoundError: there is no manifest, or a file that it lists is missing.
            ValueError: the folder holds no chats or none in the split, was made with another tokenizer, or has changed;
                or a conversation is longer than a row, or nothing of it is learnt.
        """
        self.shard_set = ShardSet.open(folder, tokenizer_hash=tokenizer_hash, kind=CHAT)
        self.split, self.row_tokens = split, row_tokens
        self.conversations = Conversations(self.shard_set, split)
        longest = int(self.conversations.lengths.max())
        if row_tokens < longest:
            wanted = f"{longest} or more, as long as the longest conversation in {self.shard_set.folder}"
            raise ValueError(f"chat: row_tokens must be {wanted}, got {row_tokens}")
        self._rows = _packed(self.conversations.lengths, row_tokens, split)
        self.targets = int(self.conversations.targets.sum())  # over all rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> ChatRow:
        """Read a row, 0 to `len(rows) - 1`."""
        ids = np.full(self.row_tokens, _PAD, TOKEN)
        documents = np.full(self.row_tokens, len(self._rows[row]), np.int32)
        targets = np.full(self.row_tokens, NO_TARGET, np.int64)
        start = 0
        for document, number in enumerate(self._rows[row].tolist()):
            found = self.conversations.read(number)
            end = start + len(found.ids)
            ids[start:end], documents[start:end] = found.ids, document
            targets[start : end - 1] = np.where(found.mask[1:], found.ids[1:].astype(np.int64), NO_TARGET)
            start = end
        return ChatRow(ids, documents, targets)

    def prompt(self, number: int) -> NDArray[np.uint16]:
        """Return conversation `number` up to the header of its last answer, which is not in it: (n,)."""
        ids = self.conversations.read(number).ids
        header = np.array(self.shard_set.manifest["answer_header"], TOKEN)
        last = int(np.flatnonzero(ids == header[0])[-1])
        return ids[: last + len(header)]

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest, which covers all content."""
        return self.shard_set.hash

    @property
    def tokens(self) -> int:
        """Ids of all conversations."""
        return int(self.conversations.lengths.sum())

    @property
    def fill(self) -> float:
        """Share of the rows' positions that are no padding."""
        return self.tokens / (len(self) * self.row_tokens)


class PreferenceRows:
    """Pairs of a chosen and a rejected answer, each as a whole conversation."""

    def __init__(self, folder: str | Path, split: str, *, tokenizer_hash: str | None = None) -> None:
        """Open and check a folder; arguments and errors as in `ChatRows`."""
        self.shard_set = ShardSet.open(folder, tokenizer_hash=tokenizer_hash, kind=PREFERENCES)
        self.split = split
        self.conversations = Conversations(self.shard_set, split)  # chosen and rejected by turns

    @property
    def pairs(self) -> int:
        """The number of pairs."""
        return len(self.conversations) // 2

    def pair(self, number: int) -> tuple[Conversation, Conversation]:
        """Read the chosen and the rejected conversation of a pair; the mask is that of what was chosen or rejected."""
        return self.conversations.read(2 * number), self.conversations.read(2 * number + 1)

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest, which covers all content."""
        return self.shard_set.hash

    @property
    def longest(self) -> int:
        """Ids of the longest conversation."""
        return int(self.conversations.lengths.max())


def _count_targets(mask: NDArray[np.uint8], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return of each conversation of a file how many ids are learnt; the first is none, as nothing precedes it.

    Args:
        mask: a bit per id.
        starts: of the conversations.
    """
    bits = np.unpackbits(mask, bitorder="little")
    learnt: NDArray[np.int64] = np.add.reduceat(bits, starts, dtype=np.int64)
    return learnt - bits[starts]


def _packed(lengths: NDArray[np.int64], row_tokens: int, key: str) -> list[NDArray[np.int64]]:
    """Return the conversations of each row."""
    order = permute(np.arange(len(lengths)), len(lengths), key)
    windows = [order[start : start + _WINDOW] for start in range(0, len(order), _WINDOW)]
    return [window[row] for window in windows for row in pack(lengths[window].tolist(), row_tokens)]
