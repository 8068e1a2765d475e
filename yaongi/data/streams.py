"""The streams of training tokens: one per domain, or one per source where the plan gives each source a share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from yaongi.data.mix import planned_shares
from yaongi.data.shards import TOKEN, Shard, ShardSet


@dataclass(frozen=True)
class Stream:
    """Shards that are read in one shuffled order; `share` is their part of the tokens of a run, on any scale."""

    name: str  # the domain; DOMAIN/SOURCE where a domain has several streams
    domain: str
    share: float
    shards: Sequence[Shard]

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)


class TokenStream:
    """Shards read as one sequence of ids."""

    def __init__(self, shard_set: ShardSet, shards: Sequence[Shard]) -> None:
        self._parts = [np.memmap(shard_set.folder / shard.file, TOKEN, "r") for shard in shards]
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self.tokens = int(self._starts[-1])

    def read(self, start: int, count: int) -> NDArray[np.uint16]:
        """Return the ids `start` to `start + count`: (count,)."""
        out = np.empty(count, TOKEN)
        filled = 0
        part = int(np.searchsorted(self._starts, start, "right")) - 1
        while filled < count:
            offset = start + filled - int(self._starts[part])
            piece = self._parts[part][offset : offset + count - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            part += 1
        return out


class TextRows:
    """The rows of a stream of ids: each is the next `row_tokens` ids, and its documents end with EOS."""

    def __init__(self, stream: TokenStream, row_tokens: int, eos_id: int) -> None:
        self._stream, self._row_tokens, self._eos_id = stream, row_tokens, eos_id

    def __len__(self) -> int:
        return self._stream.tokens // self._row_tokens

    def read(self, row: int) -> tuple[NDArray[np.uint16], NDArray[np.int32], None]:
        """Return ids and document ids, each (L,); the targets are the next tokens."""
        ids = self._stream.read(row * self._row_tokens, self._row_tokens)
        ends = np.zeros(len(ids), np.int32)
        ends[1:] = ids[:-1] == self._eos_id
        return ids, ends.cumsum(dtype=np.int32), None


def training_streams(shard_set: ShardSet, mix: Mapping[str, float]) -> list[Stream]:
    """Return the streams of the domains of `mix`, in its order; a domain without shards has one without tokens."""
    return [stream for domain, share in mix.items() for stream in _of_domain(shard_set, domain, share)]


def _of_domain(shard_set: ShardSet, domain: str, share: float) -> list[Stream]:
    shards = shard_set.shards("train", domain)
    sources = list(dict.fromkeys(shard.source for shard in shards))
    planned = shard_set.manifest.get("shares", {}).get(domain, {})
    shares = planned_shares([planned.get(source) for source in sources])
    if shares is None:
        return [Stream(domain, domain, share, shards)]
    return [
        Stream(f"{domain}/{source}", domain, share * part / sum(shares), [s for s in shards if s.source == source])
        for source, part in zip(sources, shares, strict=True)
    ]
