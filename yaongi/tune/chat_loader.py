"""Batches of conversations, and of pretraining text beside them, in the order of `data.row_loader`."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from yaongi.data.chats.rows import CHAT, ChatRows
from yaongi.data.loader import Loader, evenly
from yaongi.data.mix import mix_text, parse_mix
from yaongi.data.pieces import END_OF_TURN
from yaongi.data.row_loader import HeldOut, RowLoader, RowStream
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.held_out import held_out_rows
from yaongi.tune.config import TuneConfig

REPLAY = 0.4  # share of pretraining text beside conversations, unless a mix says otherwise: see docs/LAB.md


class ChatLoader(RowLoader):
    """The training order over conversations, the domain `chat`, and domains of token shards, which are read again."""

    def __init__(
        self,
        chats: Path,
        base: Path | None,
        tokenizer: Tokenizer,
        *,
        row_tokens: int,
        batch_rows: int,
        seed: int,
        mix: str,
    ) -> None:
        """Open both and check them.

        Args:
            chats: folder of the conversations.
            base: folder of token shards; None: no text is read again, and what is forgotten isn't measured.
            row_tokens, batch_rows, seed: as of `Loader`.
            mix: shares such as `chat=0.9,ko=0.1`; if empty, conversations, and `REPLAY` of the base's text in its mix.

        Raises:
            FileNotFoundError: a folder or a file of it is missing.
            ValueError: they were made with another tokenizer or changed, the mix has no `chat` or no text of a domain,
                or a conversation is longer than a row.
        """
        shares = parse_mix(mix or CHAT + "=1")
        again = {domain: share for domain, share in shares.items() if domain != CHAT}
        if CHAT not in shares:
            raise ValueError(f"tune: --mix must have a share of {CHAT}, got {mix}")
        if again and base is None:
            raise ValueError(f"tune: --mix with {', '.join(again)} must go with --base-data, got none")
        self.chats = ChatRows(chats, "train", row_tokens, tokenizer_hash=tokenizer.hash)
        self.base: Loader | None = None
        if base is not None:
            self.base = Loader(
                base,
                row_tokens=row_tokens,
                batch_rows=batch_rows,
                seed=seed,
                mix=mix_text(again) if again else "",
                tokenizer_hash=tokenizer.hash,
            )
            if not mix:
                again = {domain: share for domain, share in self.base.mix.items() if domain != CHAT}
                shares = {CHAT: sum(again.values()) * (1 - REPLAY) / REPLAY, **again} if again else shares
        read = len(self.chats) * row_tokens
        text = [] if self.base is None else [stream for stream in self.base.streams if stream.domain in again]
        super().__init__(
            [RowStream(CHAT, CHAT, shares[CHAT], self.chats, read), *text],
            shares,
            row_tokens=row_tokens,
            batch_rows=batch_rows,
            seed=seed,
            hash=_joined(self.chats.hash, self.base.hash) if self.base is not None and again else self.chats.hash,
            vocab_size=tokenizer.vocab_size,
        )
        self._tokenizer = tokenizer

    @property
    def measured(self) -> Sequence[str]:
        """The conversations, and all domains of the token shards."""
        there = () if self.base is None else (*self.base.domains, *self.base.unused)
        return [CHAT, *(domain for domain in there if domain != CHAT)]

    def held_out(self, domain: str, rows: int) -> HeldOut:
        """Read rows of a domain: see `RowLoader.held_out`. Of conversations the text of answers counts."""
        if domain != CHAT:
            if self.base is None:
                raise ValueError(f"tune: held-out text of {domain} must come from --base-data, got none")
            return self.base.held_out(domain, rows)
        answers = self.held_out_answers(rows)
        end = self._tokenizer.piece_to_id(END_OF_TURN)
        predicted = answers.predicted & (answers.input_ids != end)
        sizes = torch.from_numpy(self._tokenizer.byte_lengths.astype(np.int64))
        return HeldOut(
            answers.input_ids, answers.document_ids, predicted, (sizes[answers.input_ids] * predicted).sum(1)
        )

    def held_out_answers(self, rows: int) -> HeldOut:
        """Read rows of held-out conversations, in which all that is learnt counts, the end of answers too."""
        chats = self.held_out_chats()
        found = [chats.read(row) for row in evenly(len(chats), rows)]
        ids = torch.from_numpy(np.stack([row.ids for row in found]).astype(np.int64))
        documents = torch.from_numpy(np.stack([row.documents for row in found]))
        predicted = torch.zeros_like(ids, dtype=torch.bool)
        predicted[:, 1:] = torch.from_numpy(np.stack([row.targets[:-1] >= 0 for row in found]))
        return self._counting(ids, documents, predicted)

    def held_out_chats(self) -> ChatRows:
        """Open the held-out conversations. Raises ValueError if there are none."""
        return ChatRows(self.chats.shard_set.folder, "val", self.row_tokens)

    def _counting(self, ids: torch.Tensor, documents: torch.Tensor, predicted: torch.Tensor) -> HeldOut:
        sizes = torch.from_numpy(self._tokenizer.byte_lengths.astype(np.int64))
        return HeldOut(ids, documents, predicted, (sizes[ids] * predicted).sum(1))


def base_rows(config: TuneConfig, tokenizer: Tokenizer, warn: Callable[[str], None]) -> dict[str, HeldOut]:
    """Read the held-out rows of --base-data, by which what is forgotten is measured; none without it."""
    run = config.run
    if run.base_data is None:
        return {}
    return held_out_rows(run.base_data, tokenizer.hash, config.train.row_tokens, run.evaluate_rows, warn)


def _joined(*hashes: str) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
