"""A user's day: the commands of the README, in their order, on a machine without a GPU and with little text.

A command is changed only in its sizes, and where it stands for a larger machine.
"""

import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from test_readme import ENGLISH, ROOT, commands

ELSEWHERE = {  # the beginning of a command: where it is tried, or what it needs
    "./run_all_vessl.sh": "tests/train/test_train_pipeline.py",
    "pip install": "tests/test_install.py",
    "yaongi --help": "tests/test_install.py",
    "yaongi eval logickor": "tests/eval/test_eval_logickor.py",
    "yaongi eval fetch": "the hub",
    "yaongi eval tasks RUN/model --suite korean": "the hub",
    "python -m benchmarks.results": "tests/test_results.py",
    "pytest": "an H100",
    "torchrun --standalone --nproc-per-node N": "several H100s",
}
TRAINING = "--batch-tokens 1024 --row-tokens 128 --evaluate-rows 1"
MORE = {  # the beginning of a command: options that make it small
    "yaongi data tokenizer": "--vocab-size 600",
    "yaongi train --preset yaongi-4b --data TOKENS --out": f"{TRAINING} --tokens 4096 --checkpoint-every 2",
    "torchrun": f"{TRAINING} --tokens 4096 --checkpoint-every 2",
    "python -m yaongi.train": TRAINING,
    "yaongi train --init": TRAINING,
    "yaongi train --preset yaongi-4b --data TOKENS --processes 64": "--allow-epochs",
    "yaongi generate": "--max-new-tokens 4",
    "yaongi eval tasks RUN/model --out": "--limit 2",
    "yaongi tune": f"{TRAINING} --epochs 1",
    "yaongi serve": "--port PORT",
}
SMALLER = {  # words of a command that trains
    "yaongi-4b": "yaongi-tiny",
    "9000": "2",
    "2B": "2048",
    "22.02e6": "4096",
    "131072": "1024",
    "--nproc-per-node 8": "--nproc-per-node 2",
}


def matching(table: dict[str, Any], command: str) -> Any:
    return next((value for beginning, value in table.items() if command.startswith(beginning)), None)


def write_text(folder: Path) -> None:
    """Write Korean-looking texts, a file of another, and conversations."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join("".join(rng.choices("가나다라마바사아자차", k=3)) for _ in range(60))

    (folder / "한국어").mkdir()
    for i in range(120):
        (folder / "한국어" / f"{i}.txt").write_text(text())
    (folder / "FILE").write_text(text())
    talks = (f'{{"prompt": "{text()[:20]}?", "completion": "{text()[:12]}"}}\n' for _ in range(60))
    (folder / "talks.jsonl").write_text("".join(talks))


def run_program(words: list[str], folder: Path, typed: str = "") -> None:
    options = {"cwd": folder, "env": ENVIRONMENT, "input": typed, "timeout": 600}
    done = subprocess.run(words, capture_output=True, text=True, **options)
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])


def talk(words: list[str], folder: Path) -> None:
    """Ask one question."""
    run_program(words, folder, "안녕\n/save saved.jsonl\n")
    assert "안녕" in (folder / "saved.jsonl").read_text()


def serve(words: list[str], folder: Path) -> None:
    """Start the server, ask what it serves, and end it."""
    with subprocess.Popen(words, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = next(line for line in iter(process.stdout.readline, "") if "http://" in line)
        url = next(word for word in line.split() if word.startswith("http://"))
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as reply:
            assert "model" in reply.read().decode()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
WAYS = {"yaongi chat": talk, "yaongi serve": serve}  # others are run to their end


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def program(command: str) -> list[str]:
    """Return the words to run a command, made small."""
    words = f"{command} {matching(MORE, command) or ''}"
    if "train" in command and not ("--dry-run" in command or "--plan-for" in command):
        for large, small in SMALLER.items():
            words = words.replace(large, small)
    words = words.replace("PORT", str(free_port())).replace("RUN OTHER", "RUN ENDED")
    first, *rest = shlex.split(words)
    start = {"yaongi": ["yaongi"], "torchrun": ["torch.distributed.run"], "python": []}[first]
    return [sys.executable, *(["-m", *start] if start else []), *rest]


def test_what_is_tried_elsewhere_is_in_the_readme() -> None:
    for beginning, where in ELSEWHERE.items():
        assert any(command.startswith(beginning) for command in commands(ENGLISH)), beginning
        assert (ROOT / where).is_file() or where in ("the hub", "an H100", "several H100s")


@pytest.mark.long
def test_a_day(tmp_path: Path) -> None:
    """From a folder of text to a served model."""
    write_text(tmp_path)
    for command in commands(ENGLISH):
        if matching(ELSEWHERE, command) is None:
            way = matching(WAYS, command) or run_program
            way(program(command), tmp_path)
