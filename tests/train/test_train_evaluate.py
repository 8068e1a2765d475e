"""Bits per byte against values computed by hand, and samples."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_run import ALONE, session_of

from yaongi.data.row_loader import HeldOut
from yaongi.eval.bits_per_byte import bits_per_byte, nats
from yaongi.train.evaluation import samples
from yaongi.train.evaluation.held_out import HeldOutBits
from yaongi.train.evaluation.samples import draw_samples
from yaongi.world import World


def test_nats_of_a_known_model() -> None:
    """Check a model that gives every token the same probability: ln V per counted token, for any batch size."""
    rows = HeldOut(
        input_ids=torch.randint(0, 7, (5, 6)),
        document_ids=torch.zeros(5, 6, dtype=torch.int32),
        predicted=torch.rand(5, 6) < 0.5,
        text_bytes=torch.ones(5, dtype=torch.int64),
    )
    rows.predicted[:, 0] = False
    counted = int(rows.predicted.sum())
    read: list[int] = []  # positions at which the head is computed
    flat: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=7))
    flat.hidden_states = lambda ids, _: torch.zeros(*ids.shape, 1)
    flat.lm_head = lambda hidden: read.append(len(hidden)) or torch.zeros(len(hidden), 7)
    for at_once in (1, 3, 5):
        read.clear()
        total = nats(flat, rows, device=torch.device("cpu"), rows_at_once=at_once)
        assert total == pytest.approx(counted * math.log(7), rel=1e-6)
        assert sum(read) == counted
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="text_bytes must be 1 or more, got 0"):
        bits_per_byte(1.0, 0)


def test_against_a_loop_over_tokens(tokens: Path, tmp_path: Path) -> None:
    """Compare with a loop that leaves out EOS and first tokens of documents and adds up the pieces' bytes."""
    session = session_of(tokens, tmp_path / "run")
    with session:
        measured = session.evaluation.held_out.bits_per_byte(session.model, 2)
        rows = session.loader.held_out("ko", 2)
        logits = session.model(rows.input_ids, rows.document_ids).detach().double()
        total, text_bytes = 0.0, 0
        for row, (ids, documents) in enumerate(zip(rows.input_ids.tolist(), rows.document_ids.tolist(), strict=True)):
            for t in range(1, len(ids)):
                if documents[t] == documents[t - 1] and ids[t] != session.tokenizer.eos_id:
                    total -= float(logits[row, t - 1].log_softmax(-1)[ids[t]])
                    text_bytes += int(session.tokenizer.byte_lengths[ids[t]])
    assert measured["ko"] == pytest.approx(total / math.log(2) / text_bytes, rel=1e-5)
    assert list(measured) == ["ko", "en", "code", "math"]


def test_processes_share_the_rows(tokens: Path, tmp_path: Path) -> None:
    """Share four rows among three processes: each row counts once, and all do the same number of forward passes."""
    session = session_of(tokens, tmp_path / "run")
    with session:
        rows = session.loader.held_out("ko", 4)
        shares = []
        for rank in range(3):
            evaluator = HeldOutBits({}, World(rank, 3, torch.device("cpu")))
            shares.append(evaluator._share(rows))
    assert [len(share.input_ids) for share in shares] == [2, 2, 2]
    assert sum(int(share.predicted.sum()) for share in shares) == int(rows.predicted.sum())


def test_samples_are_the_same_every_time(tokens: Path, tmp_path: Path) -> None:
    """Draw twice, and check that torch's global random state is untouched."""
    session = session_of(tokens, tmp_path / "run")
    with session:
        state = torch.get_rng_state()
        drawn = [draw_samples(session.model, session.tokenizer, 5, ALONE) for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0] == drawn[1]
    assert list(drawn[0]) == ["Korean", "code", "math"]


def test_a_sample_is_the_same_alone(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pads the shorter texts of a pass changes none of them."""
    session = session_of(tokens, tmp_path / "run")
    with session:
        together = draw_samples(session.model, session.tokenizer, 8, ALONE)
        alone = {}
        for name, prompt in samples.PROMPTS.items():
            with monkeypatch.context() as patch:
                patch.setattr(samples, "PROMPTS", {name: prompt})
                alone |= draw_samples(session.model, session.tokenizer, 8, ALONE)
    assert together == alone
    assert all(len(text) > len(samples.PROMPTS[name]) for name, text in together.items())
