"""Batches of packed rows of text, in the order of `row_loader`. Needs only numpy and torch.

A packed row is `row_tokens` consecutive ids of one stream (`streams`: a domain, or one of its sources); rows don't
overlap, and the few tokens after the last full row are not used.

Documents end with EOS, which belongs to the document that it ends. `document_ids` count from 0 in each row; the model
predicts a token from the tokens before it in the same document.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from yaongi.data.mix import choose_mix
from yaongi.data.row_loader import HeldOut, RowLoader, RowStream
from yaongi.data.shards import Shard, ShardSet
from yaongi.data.streams import TextRows, TokenStream, training_streams


class Loader(RowLoader):
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
        self.shard_set = ShardSet.open(folder, tokenizer_hash=tokenizer_hash)
        self.eos_id = int(self.shard_set.manifest["eos_id"])
        there = self.shard_set.tokens("train")
        shares = choose_mix(mix, there)
        streams = [
            RowStream(s.name, s.domain, s.share, self._rows(s.shards, row_tokens, f"train, {s.name}"), s.tokens)
            for s in training_streams(self.shard_set, shares)
        ]
        super().__init__(
            streams,
            shares,
            row_tokens=row_tokens,
            batch_rows=batch_rows,
            seed=seed,
            hash=self.shard_set.hash,
            vocab_size=int(self.shard_set.manifest["vocab_size"]),
            unused=[domain for domain in there if domain not in shares],
        )

    def held_out(self, domain: str, rows: int) -> HeldOut:
        """Read rows of a domain: see `RowLoader.held_out`."""
        every = self._rows(self.shard_set.shards("val", domain), self.row_tokens, f"val, {domain}")
        found = [every.read(row) for row in evenly(len(every), rows)]
        ids = torch.from_numpy(np.stack([tokens for tokens, *_ in found]).astype(np.int64))
        documents = torch.from_numpy(np.stack([row[1] for row in found]))
        predicted = torch.zeros_like(ids, dtype=torch.bool)
        predicted[:, 1:] = (documents[:, 1:] == documents[:, :-1]) & (ids[:, 1:] != self.eos_id)
        sizes = torch.from_numpy(self.shard_set.token_bytes().astype(np.int64))
        return HeldOut(ids, documents, predicted, (sizes[ids] * predicted).sum(1))

    def _rows(self, shards: Sequence[Shard], row_tokens: int, name: str) -> TextRows:
        stream = TokenStream(self.shard_set, shards)
        if stream.tokens < row_tokens:
            wanted = f"fill a row of {row_tokens} tokens"
            where = f"{self.shard_set.folder}, {name},"
            raise ValueError(f"loader: {where} must {wanted} (or leave it out by --mix), got {stream.tokens}")
        return TextRows(stream, row_tokens, self.eos_id)


def evenly(available: int, wanted: int) -> list[int]:
    """Return the numbers of `wanted` of `available` rows, spread evenly; of all for 0, or for more than there are."""
    count = min(wanted or available, available)
    return [number * available // count for number in range(count)]
