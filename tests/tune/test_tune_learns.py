"""A tiny model, trained and tuned from nothing on the package's texts, answers questions that it never saw.

Then it learns the package's preferences.
"""

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from small_run import environment

from yaongi.data.chats.encode import encode_prompt
from yaongi.data.sources.embedded.instructions import instruction_rows
from yaongi.data.tokenizer import Tokenizer
from yaongi.files import read_json_lines
from yaongi.model import Yaongi
from yaongi.model.generation import generate


def run(module: str, *given: object) -> None:
    """Run a command of the package on one core."""
    command = [sys.executable, "-m", f"yaongi.{module}", *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


STEPS = ("--batch-tokens", 2048, "--row-tokens", 512, "--wandb", "off", "--checkpoint-every", 0)
FEW = ("--evaluate-every", 1000, "--evaluate-rows", 8, "--sample-tokens", 0, "--no-tensorboard")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tokenizer, and with a model tuned on the package's instructions in `tuned`."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer, tokens, chat, base = (folder / name for name in ("tokenizer", "tokens", "chat", "base"))
    run("data", "tokenizer", "--source", "embedded", "--vocab-size", 4096, "--megabytes", 8, "--out", tokenizer)
    run("data", "tokenize", "--source", "embedded", "--tokenizer", tokenizer, "--out", tokens)
    run("data", "chat", "--source", "embedded:instructions:5000", "--tokenizer", tokenizer, "--out", chat)
    run("train", "--data", tokens, "--out", base, "--tokens", 491520, "--mix", "ko=1", *STEPS, *FEW)
    given = ("--init", base / "model", "--data", chat, "--out", folder / "tuned", "--lr-scale", 0.3, "--epochs", 1)
    run("tune", *given, *STEPS, *FEW)
    return folder


@pytest.mark.long
def test_answers_to_unseen_questions_end(trained: Path) -> None:
    """Of 40 answers to held-out questions almost all end with their turn, and hardly one would by EOS."""
    tuned = trained / "tuned"
    model, words = Yaongi.from_pretrained(tuned / "model"), Tokenizer.of_model(tuned / "model")
    rows = islice(instruction_rows("val"), 40)
    prompts = [encode_prompt(row["messages"][:-1], words) for row in rows]

    def ended(**stop: list[int]) -> int:
        return sum(len(answer) < 64 for answer in generate(model, prompts, max_new_tokens=64, **stop))

    assert ended() >= 38
    assert ended(stop=[words.eos_id]) <= 4


@pytest.mark.long
def test_unseen_preferences_are_learnt(trained: Path, tmp_path: Path) -> None:
    """Of held-out pairs about half are told apart rightly, against the reference, before the first step; then most."""
    pairs, out = tmp_path / "pairs", tmp_path / "preferred"
    source = ("--source", "embedded:preferences:1200", "--tokenizer", trained / "tokenizer")
    run("data", "chat", *source, "--out", pairs)
    given = ("--objective", "dpo", "--init", trained / "tuned" / "model", "--data", pairs, "--out", out)
    run("tune", *given, *STEPS, *FEW, "--stop-prompts", 0)
    found = [record for record in read_json_lines(out / "metrics.jsonl") if record["event"] == "preferences"]
    assert [record["step"] for record in found] == [0, 58]
    assert found[0]["accuracy"] <= 0.7
    assert found[-1]["accuracy"] >= 0.95
    assert found[-1]["loss"] < found[0]["loss"]
