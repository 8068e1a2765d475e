"""`run_all_vessl.sh`: keys are read and not shown, mistakes are one line, and the smoke run ends with a report."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import hub_environment, serve_hub
from small_run import ROOT, documents, environment

from yaongi.data.pieces import END_OF_TURN

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
    """Read blanks, quotes, comments and a BOM; evaluate and print nothing; the environment's own values win."""
    (tmp_path / ".env").write_text("\ufeffFIRST=1" + DOTENV + "UID=7\nEUID=7\nOWN=file\nNOTHING=file\nPPID=1\nLAST=x")
    function = re.search(r"^read_dotenv\(\) \{.*?^\}", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert function
    own = environment(OWN="shell", NOTHING="")
    names = "PLAIN SPACED QUOTED SINGLE EMPTY HASH FIRST OWN NOTHING LAST"
    loop = f"for n in {names}; do printf '%s=%s\\n' $n \"${{!n}}\"; done"
    show = f"set -euo pipefail\n{function[0]}\nread_dotenv .env\n{loop}"
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, cwd=tmp_path, check=True, env=own)
    wanted = ["one", "two words", "three # not a comment", "$(touch hacked) `id`", "", "a#b", "1", "shell", "", "x"]
    assert done.stdout.splitlines() == [f"{n}={w}" for n, w in zip(names.split(), wanted, strict=True)]
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--stage", "cook"],
            "--stage must be one of env, data, tokenizer, tokens, train, report, eval, tune, chat, got cook",
        ),
        (["--what"], "option must be one of those that --help lists, got --what"),
        (["--preset"], "--preset must have a value, got none"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    """Check that a mistake is reported before anything is done."""
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: {message}\n"


def test_help() -> None:
    """Check that `--help` lists the options."""
    done = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "--smoke" in done.stdout


@pytest.mark.long
def test_smoke(tmp_path: Path) -> None:
    """Run twice in a copy of the tree with this environment; the second time nothing is left to do."""
    tree = copy_of_the_tree(tmp_path)
    (tree / ".env").write_text("WANDB_API_KEY=0123456789\nWANDB_BASE_URL=http://127.0.0.1:9\n")
    for stage in ("data", "tokenizer", "tokens", "train", "report"):
        done = run_stage(tree, stage)
        assert done.returncode == 0, done.stderr
        assert "0123456789" not in done.stdout + done.stderr
    assert (tree / "runs" / "yaongi-tiny-smoke-embedded" / "report.html").is_file()
    assert "up to date" in run_stage(tree, "tokens").stdout
    assert run_stage(tree, "train").returncode == 0
    done = run_stage(tree, "eval")
    assert done.returncode == 0, done.stderr
    assert "LIMITED to the first 5 questions" in done.stdout
    assert (tree / "runs" / "yaongi-tiny-smoke-embedded" / "eval" / "results.json").is_file()
    done = run_stage(tree, "chat", typed="안녕\n")
    assert done.returncode == 0, done.stderr
    assert "== chat" in re.sub(r"\d+m\d+s ", "", done.stdout)
    tuned = tree / "runs" / "yaongi-tiny-smoke-embedded-tuned"
    assert END_OF_TURN in (tuned / "model" / "tokenizer_config.json").read_text()
    assert "instructions" in json.loads((tuned / "eval" / "results.json").read_text())["tasks"]


def copy_of_the_tree(folder: Path) -> Path:
    """Return a copy of the checkout in `folder`, with this environment as its `.venv`."""
    tree = folder / "tree"
    left_out = shutil.ignore_patterns(".git", ".venv", "runs", "build", "wandb", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=left_out)
    shutil.rmtree(tree / "data", ignore_errors=True)
    (tree / ".venv" / "bin").mkdir(parents=True)
    python = tree / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return tree


def run_stage(tree: Path, stage: str, *more: str, typed: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run one stage of the smoke run, with these lines typed."""
    command = ["./run_all_vessl.sh", "--smoke", "--stage", stage, *more]
    env = environment(PYTHONPATH=str(tree), **env)
    return subprocess.run(command, input=typed, capture_output=True, text=True, cwd=tree, env=env)


def one_click(tree: Path, *options: str, **env: str) -> str:
    """Run all stages on some sources, and return what was printed."""
    short = ("--", "--evaluate-rows", "1", "--sample-tokens", "0", "--wandb", "off")
    printed = ""
    for stage in ("data", "tokenizer", "tokens", "train", "report"):
        done = run_stage(tree, stage, *options, *short, **env)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    (report,) = (tree / "runs").glob("*/report.html")
    assert report.is_file()
    return printed


def test_one_click_with_one_language(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path)
    (tree / "글").mkdir()
    for number, text in enumerate(documents(1, 60)):
        (tree / "글" / f"{number}.txt").write_bytes(text.encode("cp949"))
    printed = one_click(tree, "--source", "ko=글", "--encoding", "cp949")
    assert "mix: ko=40\n" in printed
    assert re.search(r"^tokenizer: [\d,]+ pieces, not 4,096: the text is too little", printed, re.MULTILINE)
    assert re.search(
        r"^ +[\d,]+ tokens: at most 4 epochs of what is there, not the 80,000 asked for", printed, re.MULTILINE
    )


@pytest.mark.long
def test_one_click_with_own_domains(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path)
    for number, name in enumerate(("law", "한국어")):
        (tree / name).mkdir()
        for i, text in enumerate(documents(number, 60)):
            (tree / name / f"{i}.txt").write_text(text)
    mix = ("--mix", "한국어=3,law=1", "--vocab-size", "700", "--gpus", "2")
    printed = one_click(tree, "--source", "law", "--source", "한국어=한국어", *mix)
    assert "mix: law=1,한국어=3\n" in printed
    assert re.search(r"tokenizer \w+ of 700 pieces", printed)


@pytest.mark.long
def test_one_click_with_a_name_of_the_hub(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path)
    rows = "".join(json.dumps({"body": text}) + "\n" for text in documents(1, 60))
    with serve_hub({"me/set": {"train.jsonl": rows.encode()}}) as (endpoint, _):
        hub = hub_environment(endpoint, str(tmp_path / "home"))
        printed = one_click(tree, "--source", "소식=hf:me/set", "--text-field", "body", **hub)
    assert "me--set: 60 documents" in printed
    assert re.search(r"^mix: 소식=100\n", printed, re.MULTILINE)
