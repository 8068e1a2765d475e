"""A tiny model, trained and tuned from nothing on the package's texts, answers questions that it never saw."""

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from small_run import environment

from yaongi.data.chats.encode import encode_prompt
from yaongi.data.sources.embedded.instructions import instruction_rows
from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi
from yaongi.model.generation import generate


def run(module: str, *given: object) -> None:
    """Run a command of the package on one core."""
    command = [sys.executable, "-m", f"yaongi.{module}", *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_answers_to_unseen_questions_end(tmp_path: Path) -> None:
    """Of 40 answers to held-out questions almost all end with their turn, and hardly one would by EOS."""
    folders = ("tokenizer", "tokens", "chat", "base", "tuned")
    tokenizer, tokens, chat, base, tuned = (tmp_path / name for name in folders)
    steps = ("--batch-tokens", 2048, "--row-tokens", 512, "--wandb", "off", "--checkpoint-every", 0)
    few = ("--evaluate-every", 1000, "--evaluate-rows", 8, "--sample-tokens", 0, "--no-tensorboard")
    run("data", "tokenizer", "--source", "embedded", "--vocab-size", 4096, "--megabytes", 8, "--out", tokenizer)
    run("data", "tokenize", "--source", "embedded", "--tokenizer", tokenizer, "--out", tokens)
    run("data", "chat", "--source", "embedded:instructions:5000", "--tokenizer", tokenizer, "--out", chat)
    run("train", "--data", tokens, "--out", base, "--tokens", 491520, "--mix", "ko=1", *steps, *few)
    run(
        "tune", "--init", base / "model", "--data", chat, "--out", tuned, "--lr-scale", 0.3, "--epochs", 1, *steps, *few
    )
    model, words = Yaongi.from_pretrained(tuned / "model"), Tokenizer.of_model(tuned / "model")
    rows = islice(instruction_rows("val"), 40)
    prompts = [encode_prompt(row["messages"][:-1], words) for row in rows]

    def ended(**stop: list[int]) -> int:
        return sum(len(answer) < 64 for answer in generate(model, prompts, max_new_tokens=64, **stop))

    assert ended() >= 38
    assert ended(stop=[words.eos_id]) <= 4
