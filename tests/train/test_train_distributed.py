"""Two processes (gloo, FSDP2) against one: the same loss curve, the same data, each other's checkpoints."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_run import arguments, environment, losses, run

SAME = ("--dtype", "float64", "--micro-rows", "2", "--sample-tokens", "0")  # float64: no rounding to hide behind


def run_two(tokens: Path, out: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    """Train in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    whole = [*launcher, "-m", "yaongi.train", *arguments(tokens, out, *more)]
    return subprocess.run(whole, capture_output=True, text=True, env=environment(), timeout=300)


def test_two_processes_and_one(tokens: Path, tmp_path: Path) -> None:
    """Loss and gradient norm of every step to 1e-5, and bits per byte at the end."""
    one, two = run(tokens, tmp_path / "one", *SAME), run_two(tokens, tmp_path / "two", *SAME)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert "2 processes" in two.stdout
    curve, other = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(curve) == len(other) == 12
    for mine, theirs in zip(curve, other, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    last = [
        next(line for line in done.stdout.splitlines() if line.startswith("step 12: held-out")) for done in (one, two)
    ]
    assert last[0] == last[1]
    assert (tmp_path / "two" / "model" / "config.json").is_file()


def test_two_processes_go_on_with_the_run_of_one(tokens: Path, tmp_path: Path) -> None:
    """One process saves at step 6 and is stopped there; two take over and end where one would have."""
    straight = run(tokens, tmp_path / "straight", *SAME)
    assert straight.returncode == 0, straight.stderr
    stopped = run(tokens, tmp_path / "run", *SAME, YAONGI_TEST_STOP="6")
    assert stopped.returncode == 0, stopped.stderr
