"""Rows of conversations: each once and whole, nothing leaks between them, and only what is learnt is a target."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SIZES

from yaongi.data.chats import rows as chat_rows
from yaongi.data.chats.encode import Encoded, encode_chat, encode_prompt
from yaongi.data.chats.rows import CHAT, NO_TARGET, PREFERENCES, ChatRow, ChatRows, PreferenceRows
from yaongi.data.loader import Loader
from yaongi.data.shards import ShardSet, ShardWriter
from yaongi.data.stages.shard_folder import write_description
from yaongi.data.tokenizer import Tokenizer
from yaongi.model import EngramConfig, ModelConfig, Yaongi, compression_map, losses


def write_chats(
    folder: Path, tokenizer: Tokenizer, conversations: list[Encoded], kind: str = CHAT, shard_tokens: int = 700
) -> Path:
    """Write conversations as the train split of a folder, in several shards."""
    writer = ShardWriter(folder, f"train/{kind}", "own", "none", shard_tokens, tokenizer.vocab_size)
    for ids, mask in conversations:
        writer.add(np.array(ids, np.int32), 1, np.array(mask))
    writer.close()
    header = encode_prompt([{"role": "user", "content": ""}], tokenizer)[-3:]
    write_description(folder, tokenizer, {"train": {kind: writer.shards}}, kind=kind, answer_header=header)
    return folder


def talks(tokenizer: Tokenizer, count: int, seed: int = 0) -> list[Encoded]:
    """Return conversations of one to three exchanges, all of them different."""
    rng = random.Random(seed)

    def talk(number: int) -> Encoded:
        messages = []
        for _ in range(rng.randint(1, 3)):
            messages.append({"role": "user", "content": f"{number} " + "가 " * rng.randint(0, 20)})
            messages.append({"role": "assistant", "content": "b" * rng.randint(1, 30), "weight": rng.choice((1, 1, 0))})
        messages[-1]["weight"] = 1
        return encode_chat(messages, tokenizer)

    return [talk(number) for number in range(count)]


def targets_of(conversation: Encoded) -> list[int]:
    """Return the targets of a conversation, from the definition."""
    ids, mask = conversation
    return [ids[i + 1] if mask[i + 1] else NO_TARGET for i in range(len(ids) - 1)] + [NO_TARGET]


def test_every_conversation_is_there_once_and_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    written = talks(tokenizer, 300)
    rows = ChatRows(write_chats(tmp_path / "c", tokenizer, written), "train", 256)
    found = []
    for number in range(len(rows)):
        ids, documents, targets = rows.read(number)
        assert (ids.dtype, documents.dtype, targets.dtype) == (np.uint16, np.int32, np.int64)
        assert ids.shape == documents.shape == targets.shape == (256,)
        assert (targets != NO_TARGET).any(), "no row without a target"
        assert documents[0] == 0
        assert set(np.diff(documents).tolist()) <= {0, 1}
        parts = [slice(*np.flatnonzero(documents == d)[[0, -1]] + [0, 1]) for d in range(documents[-1] + 1)]
        if not ids[parts[-1]].any():  # padding: a document of its own, without targets
            assert (targets[parts.pop()] == NO_TARGET).all()
        found += [(ids[part].tolist(), targets[part].tolist()) for part in parts]
    assert sorted(found) == sorted((talk.ids, targets_of(talk)) for talk in written)
    assert rows.targets == sum(t != NO_TARGET for talk in written for t in targets_of(talk))
    assert rows.fill == sum(len(talk.ids) for talk in written) / (256 * len(rows))
    assert rows.fill > 0.97


def test_nothing_leaks_between_conversations(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A row costs what its conversations cost alone, though attention, scan, convolution and n-grams run over it."""
    rows = ChatRows(write_chats(tmp_path / "c", tokenizer, talks(tokenizer, 40)), "train", 256)
    sizes = {**SIZES, "max_sequence_length": 256, "vocab_size": tokenizer.vocab_size}
    engram = EngramConfig(layer=1, heads=2, head_dim=4, rows=50, orders=(2, 3))
    config = ModelConfig.from_dict({"pattern": "MEM*ME", **sizes, "engram": (engram,)})
    model = Yaongi(config, dtype=torch.float64, compression=compression_map(tokenizer.pieces()))

    def cost(row: ChatRow, documents: np.ndarray) -> float:  # type: ignore[type-arg]
        ids, targets = torch.from_numpy(row.ids.astype(np.int64)), torch.from_numpy(row.targets)
        with torch.no_grad():
            found = model.losses(ids[None], torch.from_numpy(documents)[None], targets=targets[None])
        assert int(found.targets) == (row.targets != NO_TARGET).sum()
        return float(found.cross_entropy_sum)

    for number in range(3):
        row = rows.read(number)
        parts = [row.documents == document for document in range(row.documents[-1] + 1)]
        alone = [ChatRow(row.ids[part], row.documents[part], row.targets[part]) for part in parts]
        wanted = sum(cost(part, np.zeros_like(part.documents)) for part in alone)
        assert cost(row, row.documents) == pytest.approx(wanted, rel=1e-12)
        assert cost(row, np.zeros_like(row.documents)) != pytest.approx(wanted, rel=1e-6), "as one document it leaks"


def test_a_first_id_is_no_target(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Not even where every id is learnt: nothing precedes it."""
    written = [encode_chat([{"role": "assistant", "content": c}], tokenizer, train_on="all") for c in "가나다"]
    rows = ChatRows(write_chats(tmp_path / "c", tokenizer, written), "train", 32)
    assert rows.targets == sum(len(talk.ids) - 1 for talk in written)


@pytest.mark.parametrize("kind", [CHAT, PREFERENCES])
def test_a_conversation_of_which_nothing_is_learnt_is_refused(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """At the opening, whatever batch it would come to; its first id is no target, so that alone is nothing."""
    written = talks(tokenizer, 40)
    ids, mask = written[29]
    written[29] = Encoded(ids, [True, *[False] * (len(mask) - 1)])
    folder = write_chats(tmp_path / "c", tokenizer, written, kind=kind)
    with pytest.raises(ValueError, match=r"of each conversation an id must be learnt, got none in number 29 of .*/c, "):
        ChatRows(folder, "train", 512) if kind == CHAT else PreferenceRows(folder, "train")


def test_rows_are_the_same_in_every_process(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_rows, "_WINDOW", 64)
    folder = write_chats(tmp_path / "c", tokenizer, talks(tokenizer, 200))
    script = f"""
from yaongi.data.chats import rows
rows._WINDOW = 64
found = rows.ChatRows({str(folder)!r}, "train", 200)
print([found.read(row).ids.tolist() for row in range(len(found))])
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    rows = ChatRows(folder, "train", 200)
    assert told.strip() == str([rows.read(row).ids.tolist() for row in range(len(rows))])


def test_conversations_are_shuffled_before_they_are_packed(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window takes from the whole folder, so rows mix what was written far apart."""
    monkeypatch.setattr(chat_rows, "_WINDOW", 16)
    written = [encode_chat([{"role": "assistant", "content": str(n)}], tokenizer) for n in range(320)]
    folder = write_chats(tmp_path / "c", tokenizer, written, shard_tokens=10**6)
    rows = ChatRows(folder, "train", 64)
    numbers = [talk.ids for talk in written]
    spans = []
    for row in range(len(rows)):
        ids, documents, _ = rows.read(row)
        here = [numbers.index(ids[documents == d].tolist()) for d in range(documents[-1])]
        spans.append(max(here) - min(here))
    assert np.median(spans) > 100


def test_a_prompt_ends_with_the_header_of_the_last_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": role, "content": c} for role, c in zip(("user", "assistant") * 2, "qaqb", strict=True)]
    rows = ChatRows(write_chats(tmp_path / "c", tokenizer, [encode_chat(messages, tokenizer)]), "train", 64)
    assert rows.prompt(0).tolist() == encode_prompt(messages[:3], tokenizer)


def test_pairs_come_as_they_were_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    written = talks(tokenizer, 40)
    rows = PreferenceRows(write_chats(tmp_path / "p", tokenizer, written, PREFERENCES), "train")
    assert rows.pairs == 20
    assert rows.longest == max(len(talk.ids) for talk in written)
    for number in range(20):
        pair = rows.pair(number)
        assert [(c.ids.tolist(), c.mask.tolist()) for c in pair] == [tuple(t) for t in written[2 * number :][:2]]


def test_no_target_is_the_model_s() -> None:
    assert NO_TARGET == losses.NO_TARGET


def test_what_does_not_fit_is_refused(tokenizer: Tokenizer, tmp_path: Path, shards: Path) -> None:
    written = talks(tokenizer, 20)
    folder = write_chats(tmp_path / "c", tokenizer, written)
    longest = max(len(talk.ids) for talk in written)
    ChatRows(folder, "train", longest, tokenizer_hash=tokenizer.hash)
    for wrong, words in (
        (
            lambda: ChatRows(folder, "train", longest - 1),
            f"row_tokens must be {longest} or more, .*, got {longest - 1}",
        ),
        (lambda: ChatRows(folder, "val", 512), "must hold conversations in its split 'val', got none"),
        (
            lambda: ChatRows(folder, "train", 512, tokenizer_hash="0" * 64),
            "was made with tokenizer .*, got 000000000000",
        ),
        (lambda: ChatRows(shards, "train", 512), "must hold chat, as python -m yaongi.data chat writes it, got text"),
        (lambda: PreferenceRows(folder, "train"), "must hold preferences, .*, got chat"),
        (lambda: Loader(folder, row_tokens=64, batch_rows=1), "must hold text, .*, got chat"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    with pytest.raises(
        FileNotFoundError, match=r"no manifest.json in .*; make it with python -m yaongi.data chat --out"
    ):
        ChatRows(tmp_path / "none", "train", 512)


def test_a_changed_mask_is_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = write_chats(tmp_path / "c", tokenizer, talks(tokenizer, 9))
    shard = ShardSet.open(folder, kind=CHAT).shards("train", CHAT)[0]
    path = folder / str(shard.mask)
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ValueError, match=rf"{shard.mask} has changed"):
        ChatRows(folder, "train", 512)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{shard.mask} is truncated or changed"):
        ChatRows(folder, "train", 512)
