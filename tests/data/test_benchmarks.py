"""The benchmarks are fetched, each or said to be missing, and what quotes them is left out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import hub_environment, serve_hub
from test_commands import run
from test_download import places
from texts import random_texts, write_jsonl

from yaongi.data.stages.fetch_benchmarks import BENCHMARKS, fetch_benchmarks
from yaongi.data.tokenizer import Tokenizer

QUESTIONS = [f"{name}: {text}" for name, text in zip(BENCHMARKS, random_texts(5, len(BENCHMARKS), 14), strict=True)]


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """Return a mirror with all benchmarks: a question and its choices in the test split, and a train split."""
    for question, benchmark in zip(QUESTIONS, BENCHMARKS.values(), strict=True):
        folder = tmp_path / "mirror" / benchmark.id
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            row = {"question": f"{split} {question}", "choices": ["예", "아니오"]}
            (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
        if benchmark.subsets:
            (folder / "README.md").write_text(
                "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: test.jsonl\n---\n"
            )
    return tmp_path / "mirror"


def test_the_table_is_fetched_once(mirror: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert fetch_benchmarks(tmp_path / "b", places(mirror), said.append) == list(BENCHMARKS)
    for question, name in zip(QUESTIONS, BENCHMARKS, strict=True):
        items = [json.loads(line)["text"] for line in (tmp_path / "b" / f"{name}.jsonl").read_text().splitlines()]
        assert {f"test {question}", "예", "아니오"} <= set(items)
        assert (f"train {question}" in items) == (name in ("kmmlu", "logickor")), "no train split but KMMLU's"
    assert len(said) == len(BENCHMARKS)
    said.clear()
    assert fetch_benchmarks(tmp_path / "b", places(tmp_path / "nowhere"), said.append) == list(BENCHMARKS)
    assert said == []


def test_one_that_is_not_to_be_had_is_said(mirror: Path, tmp_path: Path) -> None:
    (mirror / BENCHMARKS["hrm8k"].id).rename(mirror / "gone")
    (mirror / BENCHMARKS["mbpp"].id / "test.jsonl").unlink()
    said: list[str] = []
    found = fetch_benchmarks(tmp_path / "b", places(mirror), said.append)
    assert found == [name for name in BENCHMARKS if name not in ("hrm8k", "mbpp")]
    lines = [line for line in said if "NOT fetched" in line]
    assert lines[0].startswith(
        "benchmark hrm8k: NOT fetched, texts that quote it stay: download: HAERAE-HUB/HRM8K is not"
    )
    assert lines[1].endswith("no items in google-research-datasets/mbpp, prompt, validation, test")


def test_from_the_hub_to_the_shards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    question = random_texts(3, 1, 13)[0]
    sets = {"openai/gsm8k": {"main/test.jsonl": json.dumps({"question": question, "answer": "4"}).encode()}}
    sets["openai/gsm8k"]["README.md"] = (
        b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/*\n---\n"
    )
    with serve_hub(sets) as (endpoint, _):
        command = [sys.executable, "-m", "yaongi.data", "benchmarks", "--out", str(tmp_path / "b")]
        environment = hub_environment(endpoint, str(tmp_path / "home"))
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "benchmark gsm8k: 2 items of openai/gsm8k at 0123456789abcdef" in done.stdout
    assert done.stdout.count("NOT fetched") == len(BENCHMARKS) - 1
    tokenizer.save(tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "en.jsonl", [f"They ask: {question}", *random_texts(6, 20)])
    write = ["tokenize", "--source", f"en={source}", "--tokenizer", str(tmp_path / "tokenizer"), "--workers", "1"]
    run(monkeypatch, *write, "--out", str(tmp_path / "t"), "--benchmark", str(tmp_path / "b"))
    assert "1 contaminated" in capsys.readouterr().out
    run(monkeypatch, *write, "--out", str(tmp_path / "u"))
    assert "no --benchmark given: texts that quote benchmarks are NOT dropped" in capsys.readouterr().out
