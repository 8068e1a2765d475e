"""Signals, once and twice, in a step, a save or an evaluation, to python, torchrun and the script; and RUN/stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small_run import ROOT, arguments, environment

from yaongi.files import find_damage
from yaongi.model.hub.checkpoint_folders import find_weights
from yaongi.train import signals
from yaongi.train.signals import StopRequest, resume_command
from yaongi.world import World

PROGRAM = str(Path(__file__).with_name("slow_program.py"))
OPTIONS = ("--sample-tokens", "0", "--micro-rows", "1", "--checkpoint-every", "2", "--evaluate-every", "4")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", PROGRAM]


def script(folder: Path, words: list[str]) -> list[str]:
    """Return the command of the script's training stage, in a tree whose python runs the slow program."""
    tree = folder / "tree"
    (tree / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(ROOT / "yaongi" / "presets", tree / "yaongi" / "presets")
    shutil.copy(ROOT / "run_all_vessl.sh", tree)
    python = tree / ".venv" / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\n'
        f'[ "$2" = yaongi.train ] && exec {sys.executable} {PROGRAM} {" ".join(words)}\nexit 1\n'
    )
    python.chmod(0o755)
    return [str(tree / "run_all_vessl.sh"), "--preset", "yaongi-tiny", "--stage", "train"]


def stopped(tokens: Path, folder: Path, how: str, part: str, *numbers: int) -> tuple[int, str, str]:
    """Start a run, send the signals while it is in the part, and return its exit code and what it printed."""
    words = arguments(tokens, folder / "run", *OPTIONS)
    commands = {"python": [sys.executable, PROGRAM, *words], "torchrun": [*TORCHRUN, *words]}
    command = script(folder, words) if how == "script" else commands[how]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(SLOW=part)
    )
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
    reader.start()
    printed = []
    assert process.stdout is not None
    for line in process.stdout:
        printed.append(line)
        if line.endswith("now\n"):  # perhaps behind what another process prints
            for number in numbers:
                process.send_signal(number)
                time.sleep(0.4)
            break
    printed += process.stdout
    process.wait(timeout=120)
    reader.join()
    return process.returncode, "".join(printed), "".join(errors)


def assert_saved(out: Path, printed: str) -> int:
    """Check that the last step done is saved whole, and return it."""
    assert "saved step " in printed, printed
    step = int(printed.split("saved step ")[1].split(";")[0])
    newest = find_weights(out)
    assert newest.name == f"step-{step:08d}"
    assert find_damage(newest) is None
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["event"] == "step"][-1] == step
    assert not list((out / "checkpoints").glob("*.tmp"))
    return step


LONG = pytest.mark.long
TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.mark.parametrize(
    ("how", "part", "numbers", "step"),
    [
        ("python", "step", (TERM,), 2),
        ("python", "save", (TERM, TERM), None),
        pytest.param("python", "evaluation", (INT,), 4, marks=LONG),
        ("python", "evaluation", (USR1, TERM), 4),
        pytest.param("python", "step", (TERM, TERM), 2, marks=LONG),
        pytest.param("script", "step", (TERM,), 2, marks=LONG),
        ("script", "save", (TERM, TERM), None),
        pytest.param("script", "evaluation", (INT,), 4, marks=LONG),
        ("torchrun", "step", (INT, INT), 2),
        pytest.param("torchrun", "save", (TERM, TERM), None, marks=LONG),
        pytest.param("torchrun", "evaluation", (TERM,), 4, marks=LONG),
    ],
)
def test_asked_to_stop(
    tokens: Path, tmp_path: Path, how: str, part: str, numbers: tuple[int, ...], step: int | None
) -> None:
    """The step is ended and saved, however often a machine asks, and the command that goes on is the right one."""
    code, printed, errors = stopped(tokens, tmp_path, how, part, *numbers)
    saved = assert_saved(tmp_path / "run", printed + errors)
    assert step in (None, saved)
    assert code == (1 if how == "torchrun" else 128 + numbers[0])
    assert errors.count("stopping after this step") == 1
    if how == "torchrun":
        assert printed.count("go on with: ") == 1
        assert "go on with: torchrun " in printed
        assert "exitcode" not in errors  # torchrun's table of processes that failed
    else:
        assert "Traceback" not in errors
        assert f"go on with: {sys.executable} -m yaongi.train --config" in printed


def test_ctrl_c_twice(tokens: Path, tmp_path: Path) -> None:
    """It ends at once, in one line; what was saved before is whole."""
    code, printed, errors = stopped(tokens, tmp_path, "python", "evaluation", INT, INT)
    assert code == 130
    assert "saved step" not in printed
    assert "Traceback" not in errors
    assert errors.endswith("interrupted\n")
    newest = find_weights(tmp_path / "run")
    assert newest.name == "step-00000004"  # the save came before the evaluation
    assert find_damage(newest) is None


@pytest.mark.parametrize("program", [[sys.executable, PROGRAM], pytest.param(TORCHRUN, marks=LONG)])
def test_the_file_stop(program: list[str], tokens: Path, tmp_path: Path) -> None:
    """`touch RUN/stop` ends after the step with code 0, and is gone; one of an earlier time stops nothing."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "stop").touch()
    words = arguments(tokens, out, *OPTIONS)
    with subprocess.Popen([*program, *words], stdout=subprocess.PIPE, text=True, env=environment(SLOW="step")) as run:
        assert run.stdout is not None
        printed = ""
        for line in run.stdout:
            printed += line
            if line.endswith("now\n"):
                (out / "stop").touch()
    assert run.returncode == 0
    assert assert_saved(out, printed) == 2
    assert not (out / "stop").exists()


STUCK = """
import sys, time
from pathlib import Path
import torch
from yaongi.train import signals
from yaongi.world import World
signals.PATIENCE = 1.0
done = [0]
with signals.StopRequest(World(0, 2, torch.device("cpu")), Path("."), lambda: done[0]) as stop:
    print("now", flush=True)
    for _ in range(int(sys.argv[1])):
        time.sleep(0.3)
        done[0] += 1
    if len(sys.argv) > 2:
        torch.randn(6000, 6000).matmul(torch.randn(6000, 6000))
        time.sleep(60)
print("ended")
"""


@pytest.mark.parametrize(("more", "code"), [((), 0), (("stuck",), 1)])
def test_a_process_that_is_stuck_ends_itself(more: tuple[str, ...], code: int) -> None:
    """After a signal, and without progress for a while; one that gets on is left to do so."""
    env = environment(TORCHELASTIC_RUN_ID="a", RANK="1")
    command = [sys.executable, "-c", STUCK, "8", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(TERM)
        printed, errors = process.communicate(timeout=50)
    assert process.returncode == code, errors
    assert ("rank 1: no progress for 1 s after a signal" in errors) == bool(more)
    assert ("ended" in printed) == (not more)


def test_the_command_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    wanted = "torchrun --nproc-per-node 8 -m yaongi.train --out a"
    assert resume_command(["--fresh", "--out", "a"]) == wanted
    typed = ["/usr/bin/python3", "/usr/bin/torchrun", "--nnodes", "2", "-m", "yaongi.train", "--out", "b"]
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: "\0".join(typed).encode() if p.name == "cmdline" else read(p))
    assert resume_command(["--out", "a"]) == "torchrun --nnodes 2 -m yaongi.train --out a"


def test_handlers_are_as_before(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with StopRequest(World(0, 1, None), tmp_path, lambda: 0) as stop:  # type: ignore[arg-type]
        assert not stop.requested()
        os.kill(os.getpid(), USR1)
        os.kill(os.getpid(), TERM)
        assert stop.requested()
        assert stop.exit_code == 128 + USR1
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
