"""Bits per byte by position, and a number to be found again in a long text."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from programs import run_module

from yaongi.data.row_loader import HeldOut
from yaongi.data.tokenizer import Tokenizer, train_tokenizer
from yaongi.eval.bits_per_byte import nats
from yaongi.eval.long_context.heat_map import heat_map, table
from yaongi.eval.long_context.passkey import NEEDLE, QUESTION, retrieved, trials
from yaongi.eval.long_context.positions import by_position
from yaongi.eval.scoring import Request, Score
from yaongi.model import ModelConfig, Yaongi

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(
        ["열쇠 번호는 12345입니다. 꼭 기억하세요. 앞에서 말한 오늘은 산에 갔다.\n"] * 20, 600, say=lambda _: None
    )


def test_positions_count_from_the_beginning_of_a_document() -> None:
    """Each token that counts is in one bucket; the nats of the buckets add up to those of the rows."""
    length = 700
    ids = torch.randint(0, 7, (3, length))
    documents = torch.zeros(3, length, dtype=torch.int32)
    documents[0, 400:], documents[1, 10:] = 1, 1
    predicted = torch.rand(3, length) < 0.5
    sizes = torch.arange(7)
    rows = HeldOut(ids, documents, predicted, (sizes[ids] * predicted).sum(1))
    parts = by_position(rows, sizes)
    assert list(parts) == ["0-255", "256-699"]
    for row in range(3):
        for place in range(length):
            begin = int((documents[row, : place + 1] == documents[row, place]).nonzero()[0])
            late = place - begin >= 256
            assert bool(parts["256-699"].predicted[row, place]) == (bool(predicted[row, place]) and late)
    assert sum(int(part.text_bytes.sum()) for part in parts.values()) == int(rows.text_bytes.sum())

    flat: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=7))
    flat.hidden_states = lambda ids, _: torch.zeros(*ids.shape, 1)
    flat.lm_head = lambda hidden: torch.zeros(len(hidden), 7)
    total = sum(nats(flat, part, device=CPU) for part in parts.values())
    assert total == pytest.approx(nats(flat, rows, device=CPU))


def test_a_text_hides_its_number_at_its_depth(tokenizer: Tokenizer) -> None:
    found = list(trials(tokenizer, (150, 300), (0.0, 0.5, 1.0), 2))
    assert len(found) == 12
    assert len({tuple(trial.request.continuation) for trial in found}) > 6
    for trial in found:
        context, answer = list(trial.request.context), list(trial.request.continuation)
        assert len(context) + len(answer) == trial.length
        text, secret = tokenizer.decode(context), tokenizer.decode(answer).strip()
        assert text.count(secret) == 2
        assert text.endswith("\n앞에서 말한 열쇠 번호는")
        needle = tokenizer.encode(f" {NEEDLE.format(number=secret)} ")
        cut = round(trial.depth * (trial.length - len(needle) - len(tokenizer.encode(QUESTION)) - len(answer)))
        assert context[cut : cut + len(needle)] == needle
    assert found == list(trials(tokenizer, (150, 300), (0.0, 0.5, 1.0), 2))
    assert found != list(trials(tokenizer, (150, 300), (0.0, 0.5, 1.0), 2, seed=1))
    with pytest.raises(ValueError, match=r"--lengths must be \d+ or more, to hold number and question, got 20"):
        list(trials(tokenizer, (20,), (0.0,), 1))


def test_what_is_found_again_is_shared_out_by_length_and_depth(tokenizer: Tokenizer) -> None:
    class Forgetful:
        """Finds only what stands near the end."""

        def score(self, requests: list[Request]) -> list[Score]:
            return [Score(0.0, "기억" in tokenizer.decode(request.context[-60:])) for request in requests]

    cells = retrieved(Forgetful(), list(trials(tokenizer, (300,), (0.0, 1.0), 3)))  # type: ignore[arg-type]
    assert cells == {(300, 0.0): 0.0, (300, 1.0): 1.0}
    assert table(cells).splitlines()[1:] == ["0.00          0%", "1.00        100%", "found again: 50.0%"]
    assert heat_map(cells).startswith(b"\x89PNG")


def test_the_command(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "mamba_heads": 4, "mamba_head_dim": 6, "mamba_groups": 2, "mamba_state": 5}
    more = {"attention_heads": 2, "attention_kv_heads": 1, "attention_head_dim": 8, "experts": 4}
    experts = {"experts_per_token": 2, "expert_size": 8, "shared_expert_size": 8, "max_sequence_length": 256}
    model = Yaongi(ModelConfig("ME*", vocab_size=tokenizer.vocab_size, **sizes, **more, **experts))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    given = ["yaongi.eval", "passkey", tmp_path / "model", "--out", tmp_path / "out"]
    done = run_module(*given, "--lengths", 128, 256, "--tries", 1)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "passkey.json").read_text())
    assert [(cell["length"], cell["depth"]) for cell in found["cells"]] == [
        (length, depth) for length in (128, 256) for depth in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert not any(math.isnan(cell["retrieved"]) for cell in found["cells"])
    assert (tmp_path / "out" / "passkey.png").is_file()
    done = run_module(*given, "--lengths", 512)
    assert (
        done.stderr.strip() == "error: passkey: --lengths must be at most the model's max_sequence_length, 256, got 512"
    )
