"""The learning study: best rates, spread, tokens to reach AdamW's end, and alignment, from runs' records."""

import json
from pathlib import Path

import pytest
import torch
from study_learning import SWEEPS, Run, Study, alignment, picture, table

STEPS = 4
ADAMW_LR, MUON_LR = SWEEPS["AdamW"], SWEEPS["Muon"]


def record(out: Path, run: Run, bits: list[float], done: bool = True) -> None:
    """Write a run's metrics: evenly spaced evaluations, the last at the end unless the run is unfinished."""
    events = [{"event": "plan", "step": 0, "steps": STEPS}]
    for step, value in zip(range(STEPS if done else STEPS - 1, -1, -1), reversed(bits), strict=False):
        events.insert(1, {"event": "evaluation", "step": step, "tokens": step * 1e6, "bpb": {"ko": value, "en": value}})
    (out / run.name).mkdir()
    (out / run.name / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study where AdamW is best at an end of its sweep and Muon inside it; some runs of the best are missing."""
    for lr, last in zip(ADAMW_LR, (1.5, 1.6, 1.7, 1.8), strict=True):
        record(tmp_path, Run("AdamW", lr), [3.0, 2.5, 2.0, 1.9, last])
    for lr, last in zip(MUON_LR, (1.4, 1.2, 1.3), strict=True):
        record(tmp_path, Run("Muon", lr), [3.0, 2.0, 1.7, 1.5, last])
    record(tmp_path, Run("AdamW", ADAMW_LR[0], 1), [3.0, 2.5, 2.0, 1.9, 1.7])
    record(tmp_path, Run("Muon", MUON_LR[1], 1), [3.0, 2.0, 1.7, 1.65, 1.3])
    record(tmp_path, Run("Muon", MUON_LR[1], 2), [3.0, 2.0, 1.0], done=False)
    return Study(tmp_path, None, "yaongi-small", 4e6, 1_000_000, ())


def test_the_table(study: Study) -> None:
    """Only complete runs count for mean and spread; the first evaluation at or below AdamW's end is reported."""
    text = table(study)
    assert f"AdamW is best at {ADAMW_LR[0]:g}, the end of its sweep" in text
    assert "Muon is best" not in text
    assert "| AdamW | 2 | 4.0 M | 1.6000 (1.5000 to 1.7000) | 1.6000 (1.5000 to 1.7000) |" in text
    assert "| Muon | 2 | 4.0 M | 1.2500 (1.2000 to 1.3000) |" in text
    assert "Muon is at AdamW's final 1.6000 after: 3.0 M tokens, 4.0 M tokens" in text


def test_no_winner_before_the_sweep_is_done(study: Study, tmp_path: Path) -> None:
    """A missing rate might be the best one."""
    (tmp_path / Run("AdamW", ADAMW_LR[2]).name / "metrics.jsonl").unlink()
    assert study.best("AdamW") is None
    assert "AdamW" not in study.groups()
    assert study.best("Muon") == MUON_LR[1]


def test_the_picture(study: Study, tmp_path: Path) -> None:
    picture(study, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_alignment() -> None:
    """Two layers share their right directions and have unrelated left ones."""
    left, right = (torch.linalg.qr(torch.randn(64, 64)).Q for _ in range(2))
    sizes = torch.logspace(0, -2, 32).diag()
    momenta = {f"layers.{i}.q_proj.weight": left[:, 32 * i : 32 * (i + 1)] @ sizes @ right[:, :32].T for i in range(2)}
    rows = [line for line in alignment(momenta) if line.startswith("| Q")]
    assert rows == [f"| Q | 1 | {r} | 1.000 | {r / 64:.3f} | 0.000 | {r / 64:.3f} |" for r in (1, 4, 16)]


def test_another_study_in_the_folder(study: Study, tmp_path: Path) -> None:
    """A run made by another command isn't taken for this study's."""
    run = Run("Muon", MUON_LR[1])
    (tmp_path / run.name / "command.txt").write_text("python -m yaongi.train --warmup 0.02")
    with pytest.raises(ValueError, match=r"^study: --out must be another, got .* with a run of `python -m yaongi"):
        study.train(run)
