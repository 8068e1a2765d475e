"""The report: a page about a run, or several, in two languages, as a browser shows it."""

import html
import importlib.metadata
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_module
from small_run import environment, run

from yaongi.train.metrics.environment import environment as run_environment
from yaongi.train.report import words
from yaongi.train.report.kernels import kernel_panels
from yaongi.train.report.page import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REPORT = Path(words.__file__).parent


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a made-up run in which everything happened that a page can show."""
    folder = tmp_path_factory.mktemp("runs") / "eventful"
    folder.mkdir()
    plan = {"preset": "yaongi-tiny", "device": "CPU", "parameters": 1228712, "active": 641032, "steps": 40}
    plan |= {"processes": 2, "flops_per_token": 4.5e6, "precision": "fp8: experts in 2 of 6 layers", "tokens": 40960}
    source = {"name": "ko/<wiki>", "there": 5000, "wanted": 20000.0}
    start = {"command": "python -m yaongi.train", "commit": "0123", "versions": "torch 2", "machine": "2 cores"}
    start["hosts"] = "gpu1 × 1, gpu2 × 1"
    records: list[dict[str, Any]] = [{"event": "plan", "step": 0, **plan}]
    for first in (0, 20):
        records.append({"event": "start", "step": first, **start, "sources": [source]})
        for step in range(first + 1, first + 21):
            values = {"loss": 9.0 / step, "gnorm": 1.0 + step % 3, "tokens": 1024 * step, "hours": step / 100}
            values |= {
                "tokens_per_second": 900.0,
                "tflops": 0.1,
                "memory": 8e8,
                "lr": 1e-2,
                "adam_lr": 1e-3,
                "mfu": 0.4,
            }
            values |= {"fp8_saturated": 0.01, "spike": step == 7, "rank_seconds": [0.1, 0.2, 0.3][: 2 + step % 2]}
            if step % 10 == 0:
                values |= {"data_wait": 0.1, "loads": [[5, 3], [4, 4]], "experts_cv": 0.2}
                score = {"metrics": {"acc": {"value": step / 50}}, "margin": step / 20}
                records.append({"event": "checkpoint", "step": step, "seconds": 1.0, "waited": 0.0})
                records.append({"event": "tasks", "step": step, "tokens": 1024 * step, "scores": {"basics": score}})
                records.append({"event": "samples", "step": step, "texts": {"Korean": f"<글 {step}>"}})
                bits = {"ko": 2.0 / step, "math": 3.0 / step}
                records.append({"event": "evaluation", "step": step, "tokens": 1024 * step, "bpb": bits})
            records.append({"event": "step", "step": step, **values})
    records.append({"event": "init", "step": 0, "folder": "other/run", "at": 5, "steps": 5, "tokens": 5120})
    records.append({"event": "from_step", "step": 20})
    records.append({"event": "changed", "step": 20, "fields": {"train.clip": [1.0, 0.5]}})
    records.append({"event": "skip_batches", "step": 20, "batches": 2, "samples": [160, 175]})
    records.append({"event": "bad_step", "step": 21, "what": "the loss", "tokens": 0})
    records.append({"event": "evaluation_without_fp8", "step": 40, "tokens": 40960, "bpb": {"ko": 0.1, "math": 0.2}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.json").write_text(json.dumps({"preset": "yaongi-tiny", "train": {"clip": 1.0}}))
    return folder


def test_messages(tmp_path: Path) -> None:
    """Check the errors for no run, no step, no benchmark file, and a file that is not such JSON."""
    with pytest.raises(FileNotFoundError, match=r"no metrics.jsonl in .*; train first"):
        write_report([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step is recorded"):
        write_report([tmp_path])
    with pytest.raises(FileNotFoundError, match="no benchmark file"):
        kernel_panels(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"benchmarks": [{"name": "a"}]}')
    with pytest.raises(ValueError, match="must be JSON of pytest-benchmark"):
        kernel_panels(tmp_path / "bad.json")


def test_a_run_s_own_page(tokens: Path, tmp_path: Path) -> None:
    """Run the report's own command with the panels on kernels; the command and the text's sources are recorded."""
    out = tmp_path / "run"
    assert run(tokens, out, "--stop-after", "2").returncode == 0
    info = {"of_floor": 0.5, "x torch": 2.0, "x quack": 1.2}
    (tmp_path / "bench.json").write_text(json.dumps({"benchmarks": [{"name": "test_moe", "extra_info": info}]}))
    done = run_module("yaongi.train.report", out, "--benchmarks", tmp_path / "bench.json", env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out / "report.html")
    page = (out / "report.html").read_text()
    assert "kernels: share of the roofline" in page
    assert "-m yaongi.train" in page
    assert not re.search(r"(src|href)=\"(?!#|data:)", page.replace("xlink:href", "href")), "it needs another file"


def test_a_start_is_recorded_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    found = run_environment()["versions"]
    assert f"torch {torch.__version__}" in found
    assert "triton" not in found


def test_what_the_page_shows(eventful: Path, tmp_path: Path) -> None:
    page = write_report([eventful], tmp_path / "page.html", refresh=30).read_text()
    shown = [
        "1,228,712 parameters",
        "40 / 40 steps",
        "CPU × 2",
        "MFU 40.0%",
        "most casts of a step that saturated: 1.0%",
    ]
    shown += [
        "python -m yaongi.train",
        "0123",
        "gpu1 × 1, gpu2 × 1",
        "micro-batches of a step by rank, ms",
        "ko/&lt;wiki&gt;",
        "4.00",
        "train.clip",
        "&lt;글 10&gt;",
        "&lt;글 40&gt;",
    ]
    shown += ["other/run, 5 steps, 5.1k tokens", "step 20, changed", "train.clip 1.0 → 0.5", "2 (rows 160–175)"]
    shown += ["step 20, gone back to this checkpoint", "step 20, batches left out"]
    shown += ["without fp8", '<meta http-equiv="refresh" content="30">', "checkpoint", "skipped step", "loss spike"]
    for text in shown:
        assert text in page, text
    assert page.count('type="radio"') == 3
    assert "<글" not in page
    assert [f"<th>{step}</th>" in page for step in (10, 20, 30, 40)] == [True] * 4


def test_every_word_is_translated(eventful: Path, tmp_path: Path) -> None:
    """The Korean page needs no phrase that the table lacks, and the table has none that no page needs."""
    page = html.unescape(write_report([eventful], tmp_path / "page.html", language="ko").read_text())
    for text in ("학습 곡선", "전문가별 부하", "건너뛴 스텝", "포화된 변환"):
        assert text in page
    sources = "".join(path.read_text() for path in REPORT.glob("*.py") if path.name != "words.py")
    assert [p for p in words._KOREAN if f'"{p}"' not in sources and f"'{p}'" not in sources] == []


def test_a_run_without_held_out_text(eventful: Path, tmp_path: Path) -> None:
    """Its evaluations have no domain, and so no mean."""
    (tmp_path / "metrics.jsonl").write_text(
        re.sub(r'"bpb": {[^}]*}', '"bpb": {}', (eventful / "metrics.jsonl").read_text())
    )
    assert "<thead>" in write_report([tmp_path]).read_text()


def test_several_runs(eventful: Path, tmp_path: Path) -> None:
    """Their curves share panels, and the settings that differ stand unfolded."""
    other = tmp_path / "other"
    shutil.copytree(eventful, other)
    (other / "config.json").write_text(json.dumps({"preset": "yaongi-tiny", "train": {"clip": 0.5}}))
    page = write_report([eventful, other], tmp_path / "page.html").read_text()
    assert "<title>eventful, other</title>" in page
    assert "<th>train.clip</th><td>1.0</td><td>0.5</td>" in page[: page.index("<details>")]
    assert "<th>preset</th>" not in page[: page.index("<details>")]


def test_watching_ends_with_the_run(eventful: Path, tmp_path: Path) -> None:
    """A finished run's page isn't loaded again, and the command ends."""
    assert run_module("yaongi.train.report", eventful, "--watch", 60, "--out", tmp_path / "p.html").returncode == 0
    assert "http-equiv" not in (tmp_path / "p.html").read_text()


@pytest.mark.skipif(BROWSER is None, reason="needs a chromium")
def test_nothing_is_wider_than_the_screen(eventful: Path, tmp_path: Path) -> None:
    """Load the page in a browser, as wide as a phone and as a desk's screen."""
    write_report([eventful], tmp_path / "page.html")
    widths = (390, 1280)
    frames = "".join(f'<iframe src="page.html" width="{width}" height="900"></iframe>' for width in widths)
    measure = "[...document.querySelectorAll('iframe')].map(f=>f.contentDocument.documentElement.scrollWidth)"
    (tmp_path / "frames.html").write_text(f"{frames}<script>onload=()=>{{document.title={measure}}}</script>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    assert BROWSER is not None
    program = [BROWSER, *options, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frames.html").as_uri()]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\d+),(\d+)</title>", done.stdout)
    assert found, done.stderr
    for got, width in zip(found.groups(), widths, strict=True):
        assert 100 < int(got) <= width
