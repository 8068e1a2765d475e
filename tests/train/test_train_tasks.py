"""Scores on tasks in the middle of a run: recorded, printed, drawn, those of the saved model, and without effect."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import ALONE, arguments, losses, run, session_of

from yaongi.eval.basics.suite import TASKS, basics_items
from yaongi.eval.evaluate import Settings, evaluate
from yaongi.eval.harness.suites import BASICS
from yaongi.files import read_json_lines
from yaongi.train.command_line import parse
from yaongi.train.evaluation import task_scores
from yaongi.train.program import train
from yaongi.train.report.curves import Curves
from yaongi.train.report.run import Run


def test_tasks_in_training(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_scores, "basics_items", lambda: basics_items(3))
    out = tmp_path / "run"
    words = arguments(tokens, out, "--evaluate-tasks", "basics", "--evaluate-tasks-every", "2")
    assert train(parse(words), ALONE, words) == 0
    records = read_json_lines(out / "metrics.jsonl")
    found = [record for record in records if record["event"] == "tasks"]
    assert [record["step"] for record in found] == [0, 12]
    last: dict[str, Any] = found[-1]["scores"]
    assert list(last) == [*TASKS, "basics"]
    assert last["basics"]["n"] == 24
    said = capsys.readouterr().out
    assert f"step 12: basics {100 * last['basics']['metrics']['acc']['value']:.1f}%" in said
    without = [record for record in records if record["event"] != "tasks"]
    panels, fewer = (Curves([Run(out, part)], "en").panels() for part in (records, without))
    assert len(panels) == len(fewer) + 2
    saved = evaluate(out / "model", [BASICS], Settings(tmp_path / "eval", limit=3), ALONE, print)
    assert saved is not None
    assert saved["model"]["trained_tokens"] == 12 * 512
    for name, entry in last.items():
        assert saved["tasks"][name]["metrics"]["acc"]["value"] == entry["metrics"]["acc"]["value"]
        assert saved["tasks"][name]["margin"] == pytest.approx(entry["margin"], rel=1e-4)
    assert run(tokens, tmp_path / "plain").returncode == 0
    assert losses(out) == losses(tmp_path / "plain")


def test_a_checkpoint_is_evaluated(tokens: Path, tmp_path: Path) -> None:
    """A run stands for its newest checkpoint, whose tokens and name are in the results."""
    session = session_of(tokens, tmp_path / "run")
    with session:
        batches = session.batches()
        for _ in range(3):
            session.train_step(next(batches))
        session.save(wait=True)
    found = evaluate(tmp_path / "run", [BASICS], Settings(tmp_path / "eval", limit=1), ALONE, print)
    assert found is not None
    assert found["model"]["trained_tokens"] == 3 * 512
    assert found["model"]["name"] == "run"
    assert len(found["model"]["weights"]) == 64
    assert json.loads((tmp_path / "eval" / "results.json").read_text()) == found
