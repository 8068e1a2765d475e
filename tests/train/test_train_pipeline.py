"""`run_all_vessl.sh`: keys are read and not shown, mistakes are one line, and the smoke run ends with a report."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import ROOT, environment

SCRIPT = ROOT / "run_all_vessl.sh"
DOTENV = r"""
# a comment
PLAIN=one
  export SPACED = two words # and a comment
QUOTED="three # not a comment"
SINGLE='$(touch hacked) `id`'
EMPTY=
HASH=a#b
not a line
"""


def test_dotenv(tmp_path: Path) -> None:
    """Read blanks, quotes and comments; evaluate and print nothing."""
    (tmp_path / ".env").write_text(DOTENV)
    function = re.search(r"^read_dotenv\(\) \{.*?^\}", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert function
    names = "PLAIN SPACED QUOTED SINGLE EMPTY HASH"
    loop = f"for n in {names}; do printf '%s=%s\\n' $n \"${{!n}}\"; done"
    show = f"set -euo pipefail\n{function[0]}\nread_dotenv .env\n{loop}"
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, cwd=tmp_path, check=True)
    wanted = ["one", "two words", "three # not a comment", "$(touch hacked) `id`", "", "a#b"]
    assert done.stdout.splitlines() == [f"{n}={w}" for n, w in zip(names.split(), wanted, strict=True)]
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "cook"], "--stage must be one of env, data, tokenizer, tokens, train, report, got cook"),
        (["--what"], "option must be one of those above, got --what"),
        (["--preset"], "--preset must have a value, got none"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    """Check that a mistake is reported before anything is done."""
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr


def test_help() -> None:
    """Check that `--help` lists the options."""
    done = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "--smoke" in done.stdout


@pytest.mark.long
def test_smoke(tmp_path: Path) -> None:
    """Run twice in a copy of the tree with this environment; the second time nothing is left to do."""
    tree = tmp_path / "tree"
    left_out = shutil.ignore_patterns(".git", ".venv", "runs", "build", "wandb", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=left_out)
    shutil.rmtree(tree / "data", ignore_errors=True)
    (tree / ".env").write_text("WANDB_API_KEY=0123456789\nWANDB_BASE_URL=http://127.0.0.1:9\n")
    (tree / ".venv" / "bin").mkdir(parents=True)
    python = tree / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for stage in ("data", "tokenizer", "tokens", "train", "report"):
        done = run_stage(tree, stage)
        assert done.returncode == 0, done.stderr
        assert "0123456789" not in done.stdout + done.stderr
    assert (tree / "runs" / "yaongi-tiny-smoke-embedded" / "report.html").is_file()
    assert "up to date" in run_stage(tree, "tokens").stdout
    assert run_stage(tree, "train").returncode == 0


def run_stage(tree: Path, stage: str) -> subprocess.CompletedProcess[str]:
    """Run one stage of the smoke run."""
    command = ["./run_all_vessl.sh", "--smoke", "--stage", stage]
    return subprocess.run(command, capture_output=True, text=True, cwd=tree, env=environment(PYTHONPATH=str(tree)))
