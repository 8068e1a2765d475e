"""Conversations and text read again beside them: in the trainer's order, each with its own targets."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from yaongi.data.chats.rows import CHAT, ChatRows
from yaongi.data.loader import Loader
from yaongi.data.pieces import END_OF_TURN
from yaongi.data.tokenizer import Tokenizer
from yaongi.model.losses import next_tokens
from yaongi.tune.chat_loader import ChatLoader

ROW = 64


def make(chats: Path, tokenizer: Tokenizer, base: Path | None = None, mix: str = "", seed: int = 0) -> ChatLoader:
    return ChatLoader(chats, base, tokenizer, row_tokens=ROW, batch_rows=4, seed=seed, mix=mix)


def test_an_epoch_has_each_row_once_and_its_targets(chats: Path, tokenizer: Tokenizer) -> None:
    loader, rows = make(chats, tokenizer), ChatRows(chats, "train", ROW)
    wanted = Counter((row.ids.tobytes(), row.targets.tobytes()) for row in map(rows.read, range(len(rows))))
    for epoch in (0, 1):
        batch = loader.read(range(epoch * len(rows), (epoch + 1) * len(rows)))
        assert batch.targets is not None
        found = zip(batch.input_ids.numpy().astype("<u2"), batch.targets.numpy(), strict=True)
        assert Counter((ids.tobytes(), targets.tobytes()) for ids, targets in found) == wanted
    first, second = (loader.read(range(k, k + len(rows))).input_ids for k in (0, len(rows)))
    assert not first.equal(second)
    assert not first.equal(make(chats, tokenizer, seed=1).read(range(len(rows))).input_ids)


def test_text_is_read_again_at_its_share_and_predicts_all_its_tokens(
    chats: Path, tokens: Path, tokenizer: Tokenizer
) -> None:
    loader = make(chats, tokenizer, tokens, "chat=0.75,ko=0.1,en=0.15")
    batch = loader.read(range(400))
    assert batch.targets is not None
    names = [loader.domains[number] for number in batch.domains]
    assert Counter(names) == {"chat": 300, "ko": 40, "en": 60}
    text = torch.tensor([name != CHAT for name in names])
    assert batch.targets[text].equal(next_tokens(batch.input_ids, batch.document_ids)[text])
    assert not batch.targets[~text].equal(next_tokens(batch.input_ids, batch.document_ids)[~text])
    alone = Loader(tokens, row_tokens=ROW, batch_rows=4, mix="ko=1")
    assert batch.input_ids[[name == "ko" for name in names]].equal(alone.read(range(40)).input_ids)


def test_without_a_mix_two_rows_of_five_are_the_base_s(chats: Path, tokens: Path, tokenizer: Tokenizer) -> None:
    loader = make(chats, tokenizer, tokens)
    names = [loader.domains[number] for number in loader.read(range(500)).domains]
    assert Counter(names) == {"chat": 300, "ko": 80, "en": 40, "code": 50, "math": 30}
    alone = make(chats, tokenizer, tokens, "chat=1")
    assert list(alone.domains) == ["chat"]
    assert list(alone.measured) == ["chat", "ko", "en", "code", "math"]


def test_the_position_belongs_to_the_text_that_is_read(chats: Path, tokens: Path, tokenizer: Tokenizer) -> None:
    state = make(chats, tokenizer, tokens, "chat=1,ko=1").state_dict()
    with pytest.raises(ValueError, match="mix must be"):
        make(chats, tokenizer, tokens).load_state_dict(state)
    make(chats, tokenizer, tokens, "chat=1").load_state_dict(make(chats, tokenizer).state_dict())


def test_held_out_answers(chats: Path, tokens: Path, tokenizer: Tokenizer) -> None:
    """The end of an answer counts for its loss, and not for the bits per byte of its text."""
    loader, end = make(chats, tokenizer, tokens), tokenizer.piece_to_id(END_OF_TURN)
    assert list(loader.measured) == ["chat", "ko", "en", "code", "math"]
    answers, text = loader.held_out_answers(0), loader.held_out(CHAT, 0)
    rows = ChatRows(chats, "val", ROW)
    assert int(answers.predicted.sum()) == rows.targets
    ends = answers.input_ids[answers.predicted] == end
    assert int(text.predicted.sum()) == int((~ends).sum())
    said = b"".join(
        tokenizer.decode(ids[p].tolist()).encode() for ids, p in zip(text.input_ids, text.predicted, strict=True)
    )
    assert int(text.text_bytes.sum()) == len(said)
    assert loader.held_out("ko", 3).input_ids.equal(
        Loader(tokens, row_tokens=ROW, batch_rows=1).held_out("ko", 3).input_ids
    )
