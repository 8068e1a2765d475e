"""kill -9 at any moment, also during a save: the resumed run ends as if nothing had happened, bit for bit."""

import random
import subprocess
import time
from pathlib import Path

import pytest
from small_run import command, environment, losses, run
from test_train_run import assert_same_tensors

OFTEN = ("--tokens", "12288", "--checkpoint-every", "1", "--sample-tokens", "0", "--evaluate-every", "1000")


def killed(tokens: Path, out: Path, seconds: float) -> bool:
    """Train, but kill -9 after some time of training; whether the kill came before the end."""
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "env": environment()}
    process = subprocess.Popen(command(tokens, out, *OFTEN), **quiet)  # type: ignore[call-overload]
    for line in process.stdout:
        if "bits per byte" in line or "resumed" in line:
            break
    time.sleep(seconds)
    process.kill()
    return process.wait() == -9


def compare_with_straight_run(tokens: Path, folder: Path, kills: int) -> None:
    """A run killed ``kills`` times against one that never was."""
    rng = random.Random(kills)
    assert run(tokens, folder / "straight", *OFTEN).returncode == 0
    came = sum(killed(tokens, folder / "killed", rng.uniform(0.0, 0.5)) for _ in range(kills))
    assert came, "no kill came before the end of the run"
    done = run(tokens, folder / "killed", *OFTEN)
    assert done.returncode == 0, done.stderr
    assert losses(folder / "killed") == losses(folder / "straight")
    assert not list((folder / "killed" / "checkpoints").glob("*.tmp"))
    assert_same_tensors(folder / "killed", folder / "straight")


def test_three_kills(tokens: Path, tmp_path: Path) -> None:
    """The short form."""
    compare_with_straight_run(tokens, tmp_path, 3)


@pytest.mark.long
def test_twenty_kills(tokens: Path, tmp_path: Path) -> None:
    """The long form."""
    compare_with_straight_run(tokens, tmp_path, 20)
