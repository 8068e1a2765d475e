"""A process of a run under torchrun that is killed: all start anew and go on from the last checkpoint."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from small_run import arguments, environment, final_tensors, losses

MORE = ("--sample-tokens", "0", "--micro-rows", "2", "--evaluate-every", "100", "--checkpoint-every", "2")


def start(tokens: Path, out: Path, *more: str, restarts: int = 0) -> "subprocess.Popen[str]":
    """Begin to train with two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [*launcher, "--max-restarts", str(restarts), "-m", "yaongi.train", *arguments(tokens, out, *MORE, *more)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(program, text=True, env=environment(), **pipes)


def wait_for_step(process: "subprocess.Popen[str]", out: Path, step: int) -> None:
    """Wait until a step is recorded."""
    path = out / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text().count('"event": "step"') >= step):
        time.sleep(0.05)


def workers(process: "subprocess.Popen[str]") -> list[int]:
    """Return the ids of the training processes."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child.pid for child in children if "yaongi.train" in child.cmdline()]


@pytest.mark.long
def test_a_killed_process(tokens: Path, tmp_path: Path) -> None:
    """Kill one of two: torchrun starts both anew, and they end with the bits of a run without a kill."""
    straight = start(tokens, tmp_path / "straight")
    assert straight.wait(timeout=300) == 0
    process = start(tokens, tmp_path / "run", "--fresh", restarts=1)
    wait_for_step(process, tmp_path / "run", 5)
    os.kill(workers(process)[1], signal.SIGKILL)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert "resumed from step " in printed
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    got, wanted = final_tensors(tmp_path / "run"), final_tensors(tmp_path / "straight")
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
