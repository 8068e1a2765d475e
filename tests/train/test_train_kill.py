"""kill -9 at random moments, also during a save: the resumed run ends with the same bits."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from small_run import command, environment, final_tensors, losses, run

EVERY = (
    "--checkpoint-every",
    "1",
    "--evaluate-every",
    "100",
    "--sample-tokens",
    "0",
)  # a save is always in progress


def start(tokens: Path, out: Path) -> "subprocess.Popen[str]":
    """Start training in a separate process."""
    return subprocess.Popen(
        command(tokens, out, *EVERY), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def steps_recorded(out: Path) -> int:
    """Count the complete lines about steps in the run's metrics."""
    path = out / "metrics.jsonl"
    return path.read_text().count('"event": "step"') if path.exists() else 0


def kill_within_steps(tokens: Path, out: Path, rng: random.Random) -> bool:
    """Start, wait for one to three more steps and a random time, kill; return whether it was killed before its end."""
    process = start(tokens, out)
    wanted = min(11, steps_recorded(out) + rng.randint(1, 3))
    while process.poll() is None and steps_recorded(out) < wanted:
        time.sleep(0.001)
    time.sleep(rng.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def kill_within_a_save(tokens: Path, out: Path, rng: random.Random) -> bool:
    """Start, wait until a checkpoint is being written, kill; return whether it was killed before its end."""
    process = start(tokens, out)
    while process.poll() is None and not list((out / "checkpoints").glob("*.tmp")):
        time.sleep(0.0005)
    time.sleep(rng.random() * 0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def straight(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run without kills."""
    out = tmp_path_factory.mktemp("straight") / "run"
    done = run(tokens, out, *EVERY)
    assert done.returncode == 0, done.stderr
    return out


def check_killed_run(tokens: Path, straight: Path, out: Path, kills: int) -> None:
    """Kill a run `kills` times, let it finish, and compare it with the run without kills."""
    rng = random.Random(kills)
    killed = [(kill_within_a_save if i % 2 else kill_within_steps)(tokens, out, rng) for i in range(kills)]
    assert any(killed)
    done = run(tokens, out, *EVERY)
    assert done.returncode == 0, done.stderr
    assert losses(out) == losses(straight)
    mine, wanted = final_tensors(out), final_tensors(straight)
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in wanted.items())
    assert not list((out / "checkpoints").glob("*.tmp"))


def test_a_few_kills(tokens: Path, straight: Path, tmp_path: Path) -> None:
    """Compare the loss curve and the last checkpoint with those of the run without kills, bit for bit."""
    check_killed_run(tokens, straight, tmp_path / "run", 3)


@pytest.mark.long
def test_twenty_kills(tokens: Path, straight: Path, tmp_path: Path) -> None:
    """Kill twenty times, five times per run."""
    for number in range(4):
        check_killed_run(tokens, straight, tmp_path / f"run{number}", 5 + number % 2)


@pytest.mark.long
def test_a_torn_pointer(tokens: Path, tmp_path: Path) -> None:
    """Without `latest` take the newest complete folder, never an unfinished one."""
    out = tmp_path / "run"
    assert run(tokens, out, *EVERY).returncode == 0
    (out / "checkpoints" / "latest").unlink()
    unfinished = out / "checkpoints" / "step-00000099.tmp"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half")
    done = run(tokens, out, *EVERY)
    assert done.returncode == 0, done.stderr
    assert "has done all of its 12 steps" in done.stdout
    assert not unfinished.exists()
    assert json.loads((out / "checkpoints" / "step-00000012" / "run.json").read_text())["step"] == 12
