"""Plans for GPUs that needn't be here: no data, no GPU, and the times that were measured."""

import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from small_run import train_here

from yaongi.train.config import PlanFor
from yaongi.train.plan import run_plan
from yaongi.train.plan.machines import H100, MACHINES, like_h100

ROOT = Path(__file__).parents[2]
RESULTS, README = ROOT / "docs" / "results.md", ROOT / "README.md"


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """Return the lines of a plan by their names."""
    assert train_here(arguments) == 0
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


@pytest.mark.parametrize(
    ("name", "like"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA H200", True), ("NVIDIA H100 PCIe", False)]
)
def test_a_gpu_that_is_here_may_be_like_an_h100(name: str, like: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert like_h100("none", torch.device("cuda")) == like
    assert not like_h100("none", torch.device("cpu"))


def test_a_run_on_such_a_gpu_is_planned_by_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_plan, "like_h100", lambda plan_for, device: True)
    found = plan(capsys, "--preset", "yaongi-small", "--plan-for", "l40s")
    assert found["time"].endswith("measured on an H100 (docs/results.md)")


def test_each_measured_preset_names_the_page_with_its_figures() -> None:
    on_page = {preset for preset, measured in H100.items() if measured.page == "docs/results.md"}
    assert on_page == results().keys()


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
        train_here(("--preset", "yaongi-4b-fp8", "--plan-for", "h100", "--processes", "2", "--parallel", "fsdp"))


def table_rows() -> list[tuple[str, ...]]:
    """Return the cells of the README's table of machines and prices."""
    row = r"^\| (\w+) \(\d+ GB\) \| `([\w-]+)` \| ([\d ×]+) \| (\d+k) \| ([\d.]+) \| ([^|]+) \| ([^|]+) \|$"
    return re.findall(row, README.read_text(), re.MULTILINE)


def test_the_readme_has_its_table() -> None:
    assert [row[0] for row in table_rows()] == ["rtx4090", "l40s", "h100", "h100", "h100", "h200", "h200"]


@pytest.mark.long
@pytest.mark.parametrize("row", table_rows(), ids=lambda row: f"{row[0]} {row[1]}")
def test_the_readme_s_prices_are_those_of_the_plan(row: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    machine, preset, rows, speed, price, one, fifteen = row
    words = ("--preset", preset, "--plan-for", machine, "--dollars-per-hour", price, "--tokens")
    for tokens, shown in (("1B", one), ("15B", fifteen)):
        found = plan(capsys, *words, tokens)
        assert found["micro-batch"].startswith(rows.replace("×", "x"))
        assert f" at {speed} tokens/s" in found["time"]
        dollars = float(found["cost"].removeprefix("about $"))
        hours, _, cost = shown.partition(" h, $")
        assert float(cost) == pytest.approx(dollars, rel=0.005, abs=0.06 if tokens == "1B" else 0.6)
        assert float(hours) == pytest.approx(dollars / float(price), rel=0.005, abs=0.06)
