"""The printed line of a step, and `metrics.jsonl`."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import ALONE, session_of

from yaongi.files import read_json_lines
from yaongi.train.distributed import slow_ranks
from yaongi.train.distributed.errors import place_of
from yaongi.train.distributed.slow_ranks import SlowRanks
from yaongi.train.formatting import duration, scientific, short, significant
from yaongi.train.metrics.display import console_line
from yaongi.train.metrics.records import Metrics
from yaongi.train.step.stepper import Stepper


def test_the_line_of_a_step() -> None:
    """Compare with the exact text."""
    record = {
        "step": 1200,
        "loss": 3.4121,
        "bpb": 1.304,
        "lr": 2e-3,
        "phase": "stable",
        "gnorm": 0.411,
        "tokens_per_second": 83_100,
        "tflops": 632.4,
        "memory": 61.2e9,
        "data_wait": 0.003,
        "experts_cv": 0.12,
        "experts_dead": 0,
        "eta": 165_870.0,
    }
    assert console_line(record, 14305) == (
        "step 1200/14305 | loss 3.412 | bpb 1.30 | lr 2.0e-3 | gnorm 0.41 | 83k tok/s | cv 0.12 | eta 46h04m"
    )
    short_run = record | {"step": 3, "experts_dead": 2, "data_wait": 0.021, "eta": 4.0, "memory": 1e9, "tflops": 0.5}
    assert console_line(short_run, 12) == (
        "step 3/12 | loss 3.412 | lr 2.0e-3 | gnorm 0.41 | 83k tok/s | data 2% | cv 0.12 dead 2 | eta 4s"
    )
    assert "rank" not in console_line(record | {"rank_seconds": [1.0, 1.004, 1.0]}, 14305)
    several = console_line(record | {"rank_seconds": [1.0, 1.029, 1.0], "experts_dead": 1}, 14305)
    assert " | slowest rank 1 +2.9% | " in several
    assert len(several) <= 100
    worst = {"step": 143050, "gnorm": 12345.678, "data_wait": 0.99, "experts_dead": 1408, "fp8_saturated": 0.123}
    for more in ({}, {"loss": 123.4567, "bpb": 46.123, "tokens_per_second": 999_000}):
        line = console_line(record | worst | more, 143050)
        assert len(line) <= 100, line
        assert "dead 1408" in line


def test_a_slow_rank_is_named_once() -> None:
    """After 20 lines in a row, again only when it was as fast as the others in between."""
    slow, even = [1.0, 1.0, 1.072], [1.0, 1.04, 1.0]
    ranks = SlowRanks(["a, GPU 0", "a, GPU 1", "b, GPU 0"])
    said = [
        ranks.warning(seconds)
        for seconds in [slow] * 19 + [even] + [slow] * 50 + [even, [], [0.0, 0.0, 0.0]] + [slow] * 20
    ]
    warning = "rank 2 (b, GPU 0) is 7.2 % slower than the median: nvidia-smi -q -d PERFORMANCE"
    assert {number: text for number, text in enumerate(said) if text} == {39: warning, len(said) - 1: warning}


def test_a_run_warns_of_a_slow_rank(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train with the seconds of two ranks in the place of one's; every second step has a line."""
    monkeypatch.setattr(slow_ranks, "LINES", 3)
    step = Stepper.__call__
    monkeypatch.setattr(Stepper, "__call__", lambda *given: replace(step(*given), rank_seconds=(1.2, 1.0)))
    with session_of(tokens, tmp_path / "run", "--log-every", "2", "--stop-after", "5") as session:
        for batches in itertools.islice(session.batches(), 5):
            session.train_step(batches)
    err = capsys.readouterr().err
    assert err == f"warning: rank 0 ({place_of(ALONE)}) is 9.1 % slower than the median: nvidia-smi -q -d PERFORMANCE\n"


def test_numbers() -> None:
    """Check the short forms of numbers."""
    assert [short(v) for v in (950, 6230, 83_100, 1.2e6, 4.28e9)] == ["950", "6.2k", "83k", "1.2M", "4.3B"]
    assert [duration(v) for v in (12, 200, 3599.7, 165_870)] == ["12s", "3m20s", "1h00m", "46h04m"]
    assert [significant(v) for v in (632.4, 41.84, 0.03121, 0)] == ["632", "41.8", "0.0312", "0"]
    assert scientific(1e-5) == "1.0e-5"


def test_cut_and_append(tmp_path: Path) -> None:
    """Drop the records after the checkpoint, and a last line that a kill has cut short."""
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in range(5):
        metrics.write("step", step, loss=1 / (step + 3))
    metrics.close()
    path.write_text(path.read_text() + '{"event": "st')
    metrics = Metrics(path)
    metrics.cut(3)
    metrics.write("step", 4, loss=0.1)
    metrics.close()
    assert [(r["step"], r["loss"]) for r in read_json_lines(path)] == [*((s, 1 / (s + 3)) for s in range(4)), (4, 0.1)]


def test_a_damaged_line_is_an_error(tmp_path: Path) -> None:
    """Check that the error names the line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n{broken\n" + json.dumps({"step": 2}) + "\n")
    with pytest.raises(ValueError, match="line 2 of"):
        read_json_lines(path)


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    """Within a letter too; and what other readers take for the end of a line is none in a text."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": n, "text": "야\u2028옹"}, ensure_ascii=False).encode() + b"\n" for n in range(2)]
    for cut in range(1, len(lines[1])):
        path.write_bytes(lines[0] + lines[1][:-cut])
        assert read_json_lines(path) == [{"step": 0, "text": "야\u2028옹"}]
    path.write_bytes(b"".join(lines) + b"[]\n")
    with pytest.raises(ValueError, match=r"line 3 of .* must be a JSON object, got list"):
        read_json_lines(path)


def test_another_process_writes_nothing(tmp_path: Path) -> None:
    """Check that a process with `enabled=False` makes no file."""
    metrics = Metrics(tmp_path / "metrics.jsonl", enabled=False)
    metrics.cut(0)
    metrics.write("step", 1, loss=1.0)
    metrics.close()
    assert not list(tmp_path.iterdir())
