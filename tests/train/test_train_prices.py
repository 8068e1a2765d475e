"""Plans for GPUs that needn't be here: no data, no GPU, and the times that were measured."""

import re
from pathlib import Path
from typing import get_args

import pytest

from yaongi.train.__main__ import run
from yaongi.train.config import PlanFor
from yaongi.train.plan.machines import H100, MACHINES

RESULTS = Path(__file__).parents[2] / "docs" / "results.md"


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """Return the lines of a plan by their names."""
    assert run(arguments) == 0
    return {line[:12].strip(): line[13:] for line in capsys.readouterr().out.splitlines() if line[:12].strip()}


def results() -> dict[str, dict[str, float]]:
    """Return the figures of the trainer's step on the results page, by preset."""
    rows = re.findall(r"^\| ours\[([\w-]+)\] \|.*\|([^|]*)\|$", RESULTS.read_text(), re.MULTILINE)
    return {name: {key: float(value) for key, value in re.findall(r"(\w+) ([\d.e+]+)", row)} for name, row in rows}


def test_every_name_is_a_machine() -> None:
    assert get_args(PlanFor) == ("none", *MACHINES)


@pytest.mark.parametrize("preset", results())
def test_times_are_those_of_the_results_page(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Compare the table's parts, and the speed of the whole run within 3 %."""
    measured = results()[preset]
    assert H100[preset].update_seconds == pytest.approx(measured["optimizer_ms"] / 1e3, rel=0.01)
    found = plan(capsys, "--preset", preset, "--plan-for", "h100")
    speed = re.search(r" at (\d+)k tokens/s, ", found["time"])
    assert speed, found["time"]
    assert 1e3 * int(speed[1]) == pytest.approx(measured["tokens_per_s"], rel=0.03)
    assert found["time"].endswith("measured on an H100 (docs/results.md)")


def test_the_price_of_fifteen_billion_tokens(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--preset", "yaongi-4b", "--plan-for", "h100", "--tokens", "15B", "--dollars-per-hour", "2.5")
    one, eight = plan(capsys, *words), plan(capsys, *words, "--processes", "8")
    dollars = [float(found["cost"].removeprefix("about $")) for found in (one, eight)]
    assert dollars[0] == pytest.approx(15e9 / 50_870 / 3600 * 2.5, rel=0.03)
    assert dollars[0] < dollars[1] < 1.06 * dollars[0], "eight GPUs cost about what one does"
    assert one["device"] == "H100 80 GB, 1 process"
    assert one["memory"].endswith("of 84.9 GB: fits")
    assert one["disk"] == "about 125 GB: checkpoints, model, tokens"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "line", "text"),
    [
        (("--model.experts", "32"), "time", "guessed from the GPU's published speed"),
        (("--recompute", "all"), "time", "guessed from the GPU's published speed"),
        (("--plan-for", "l40s"), "memory", "does not fit"),
        (("--plan-for", "a100", "--model.precision.mamba-projections", "fp8"), "precision", "emulated"),
    ],
    ids=["another model", "recomputation", "too large", "no FP8"],
)
def test_what_was_not_measured_is_said(
    more: tuple[str, ...], line: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in plan(capsys, "--preset", "yaongi-4b", "--plan-for", "h100", *more)[line]


def test_fp8_is_not_planned_with_sharded_weights() -> None:
    with pytest.raises(ValueError, match="fp8 must run with --parallel replicate, got fsdp"):
        run(("--preset", "yaongi-4b-fp8", "--plan-for", "h100", "--processes", "2", "--parallel", "fsdp"))
