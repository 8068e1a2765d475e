"""The plan and its predicted memory."""

import json
from pathlib import Path

import pytest
import torch
from small_run import ALONE, config_of, run

from yaongi.data.tokenizer import Tokenizer
from yaongi.train.plan.activations import PeakMode
from yaongi.train.plan.run_plan import make_plan, micro_rows


def test_peak_mode_counts_what_is_alive() -> None:
    """Check that two tensors alive at once are the peak, and that views and in-place operations take no memory."""
    with PeakMode() as mode:
        a = torch.empty(1000, device="meta")
        b = a.view(10, 100)[2:].add_(1)
        c = a + 1
        del a, b
        d = c * 2
        assert mode.alive == 8000
        del c, d
    assert (mode.alive, mode.peak) == (0, 8000)


def test_predicted_memory(tokens: Path, tmp_path: Path) -> None:
    """Check that the prediction is within 25 % of the process's peak memory."""
    out = tmp_path / "run"
    more = (
        "--model.hidden-size",
        "256",
        "--batch-tokens",
        "32768",
        "--row-tokens",
        "512",
        "--micro-rows",
        "32",
        "--model.max-sequence-length",
        "512",
    )
    done = run(tokens, out, *more, "--mix", "ko=1", "--stop-after", "2", "--sample-tokens", "0", "--evaluate-rows", "1")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    predicted = next(r["predicted_memory"] for r in records if r["event"] == "plan")
    taken = max(r["memory"] for r in records if r["event"] == "step")
    assert predicted == pytest.approx(taken, rel=0.25)


def test_what_does_not_fit(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the plan says so, and what to try."""
    config = config_of(tokens, tmp_path / "run", "--micro-rows", "8")
    tokenizer = Tokenizer.load(tokens / "tokenizer")
    plan = make_plan(config, tokenizer, ALONE)
    assert plan.fits
    parts = plan.memory
    low = int((parts.total - 0.5 * parts.activations) / 0.93)
    monkeypatch.setattr("yaongi.train.plan.memory.memory_of", lambda _: low)
    monkeypatch.setattr("yaongi.train.plan.memory.resident_bytes", lambda: parts.base)
    assert "try --micro-rows" in make_plan(config, tokenizer, ALONE).advice
    for policy in ("all", "mamba"):  # mamba needs more memory than all, but less time
        config = config_of(tokens, tmp_path / "run", "--micro-rows", "1", "--recompute", policy)
        low = make_plan(config, tokenizer, ALONE).memory.total / 0.93 + 1
        monkeypatch.setattr("yaongi.train.plan.memory.memory_of", lambda _, low=low: low)
        config = config_of(tokens, tmp_path / "run", "--micro-rows", "1")
        assert make_plan(config, tokenizer, ALONE).advice == f"try --micro-rows 1 --recompute {policy}"
    monkeypatch.setattr("yaongi.train.plan.memory.memory_of", lambda _: 1000)
    assert "does not fit: try more GPUs" in make_plan(config, tokenizer, ALONE).lines()


def test_micro_batches_divide_the_batch(tokens: Path, tmp_path: Path) -> None:
    """Choose the largest divisor that fits, and refuse a number that doesn't divide."""
    config = config_of(tokens, tmp_path / "run")
    assert micro_rows(config, 1, "replicate", 5) == 4
    assert micro_rows(config, 2, "fsdp", 100) == 4
    with pytest.raises(ValueError, match="multiple of 3 processes"):
        micro_rows(config, 3, "fsdp", 1)
    asked = config_of(tokens, tmp_path / "run", "--micro-rows", "3")
    with pytest.raises(ValueError, match="divide the 8 rows of a batch, got 3"):
        micro_rows(asked, 1, "replicate", 1)


def test_micro_batches_of_several_processes(tokens: Path, tmp_path: Path) -> None:
    """Choose the largest number of rows that fits and leaves no process waiting; refuse too few micro-batches."""

    def chosen(rows: int, processes: int, fits: int, *more: str) -> int:
        config = config_of(tokens, tmp_path / "run", "--batch-tokens", str(64 * rows), *more)
        return micro_rows(config, processes, "replicate", fits)

    assert chosen(256, 8, 4) == 4
    assert chosen(256, 3, 4) == 2, "43 of 2 rows; 22 of 4 are 2 rows more"
    assert chosen(256, 256, 4) == 1
    assert chosen(8, 3, 1) == 1
    with pytest.raises(ValueError, match="at least 3 micro-batches for 3 processes, got 2: try --micro-rows 2"):
        chosen(8, 3, 9, "--micro-rows", "4")
    with pytest.raises(ValueError, match="at least 9 micro-batches for 9 processes, got 8: try --batch-tokens 576"):
        chosen(8, 9, 9)
