"""The results page from pytest-benchmark's JSON."""

import json
import subprocess
from pathlib import Path
from typing import Any

from programs import run_module

ROOT = Path(__file__).resolve().parent.parent
GPU = "NVIDIA H100 80GB HBM3"


def benchmark(file: str, name: str, **info: Any) -> dict[str, Any]:
    return {"fullname": f"benchmarks/bench_{file}.py::test_{name}", "name": f"test_{name}", "extra_info": info}


def written(path: Path, *benchmarks: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"datetime": "2026-11-24T10:00:00", "benchmarks": benchmarks}))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_module("benchmarks.results", *arguments, cwd=ROOT)


def test_a_page_of_two_files(tmp_path: Path) -> None:
    """The fastest peer counts, and for a case that was measured twice, the later figures."""
    figures = {"gpu": GPU, "floor_ms": 0.1, "of_floor": 0.5, "tflops": 400.0, "gb_per_s": 900.0, "peak": "0.03 GB"}
    peers = {"torch ms": 0.8, "x torch": 4.0, "compiled ms": 0.5, "x compiled": 2.5}
    first = written(tmp_path / "a.json", benchmark("moe", "moe[F]", ms=9.0, **figures, **peers))
    steps = [benchmark("train_step", f"{n}[a]", gpu=GPU, tokens_per_s=v) for n, v in (("ours", 5e4), ("peer", 4e4))]
    second = written(tmp_path / "b.json", benchmark("moe", "moe[F]", ms=0.2, **figures, **peers), *steps)
    done = run(first, second, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "results.md").read_text()
    assert f"{GPU}, 2026-11-24, `pytest benchmarks/" in page
    assert "| moe[F] | 0.2 ms | 50% | compiled 0.5 ms | 2.50 | tflops 400, gb_per_s 900, peak 0.03 GB |" in page
    assert "| ours[a] | 2e+04 ms |  | peer 2.5e+04 ms | 1.25 | tokens_per_s 5e+04 |" in page
    assert "| peer[a] |  |  |  |  | tokens_per_s 4e+04 |" in page
    assert (tmp_path / "results.png").stat().st_size > 5000


def test_files_that_make_no_page(tmp_path: Path) -> None:
    """The error is one line, and nothing is written."""
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    other = written(tmp_path / "other.json", benchmark("moe", "a", gpu="NVIDIA H200"), benchmark("moe", "b", gpu=GPU))
    for path, wanted in (
        (bad, f"results: {bad} must be JSON of pytest-benchmark, got "),
        (other, f"results: cases must be of one GPU, got {GPU}, NVIDIA H200\n"),
        (tmp_path / "none.json", "[Errno 2] No such file"),
    ):
        done = run(path, "--out", tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith(wanted)
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("results*"))
