"""A model of a few thousand parameters, the commands that train it, and texts for it."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_module
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from yaongi.data.stages.tokenize_sources import Options, tokenize_sources
from yaongi.data.tokenizer import train_tokenizer
from yaongi.train import program
from yaongi.train.command_line import parse
from yaongi.train.config import Config
from yaongi.train.session import Session
from yaongi.world import World

ROOT = Path(__file__).resolve().parent.parent.parent
ALONE = World(0, 1, torch.device("cpu"))
TOML = """
[model]
pattern = "ME*M*"
hidden_size = 32
vocab_size = 600
mamba_heads = 4
mamba_head_dim = 8
mamba_groups = 2
mamba_state = 8
attention_heads = 2
attention_kv_heads = 1
attention_head_dim = 16
experts = 4
experts_per_token = 2
expert_size = 16
shared_expert_size = 32
max_sequence_length = 64

[[model.engram]]
layer = 1
heads = 2
head_dim = 8
rows = 50

[train]
tokens = 6144
batch_tokens = 512
row_tokens = 64
evaluate_every = 6
evaluate_rows = 2
checkpoint_every = 3
log_every = 4
sample_tokens = 3
wandb = "off"
tensorboard = false
"""
# Six steps with sizes that the fast kernels support; rows are long enough for several blocks of each kernel's sums.
FOR_KERNELS = (
    *("--model.hidden-size", "64", "--model.mamba-head-dim", "16", "--model.mamba-state", "16"),
    *("--model.expert-size", "32", "--model.shared-expert-size", "32", "--model.attention-head-dim", "32"),
    *("--model.max-sequence-length", "512", "--row-tokens", "512", "--batch-tokens", "4096", "--micro-rows", "2"),
    *("--tokens", "24576", "--evaluate-every", "3", "--checkpoint-every", "0"),
)


def documents(seed: int, count: int) -> list[str]:
    """Return texts of 40 random words."""
    rng = random.Random(seed)
    letters = "abcdefghij가나다라마바사아"
    return [" ".join("".join(rng.choices(letters, k=4)) for _ in range(40)) for _ in range(count)]


def write_tokens(folder: Path) -> Path:
    """Write token shards of four domains of such texts, with a tokenizer of 600 pieces, and return their folder."""
    for number, domain in enumerate(("ko", "en", "code", "math")):
        for split, seed, count in (("train", number, 60), ("val", 100 + number, 8)):
            (folder / split / domain).mkdir(parents=True)
            for i, text in enumerate(documents(seed, count)):
                (folder / split / domain / f"{i}.txt").write_text(text)
    tokenizer = train_tokenizer(documents(1, 200), 600)
    tokenize_sources([str(folder)], tokenizer, folder / "tokens", Options(), workers=1, say=lambda _: None)
    return folder / "tokens"


def arguments(tokens: Path, out: Path, *more: str) -> list[str]:
    """Return the command line of a run of twelve steps in `out`, and write its configuration file beside `out`."""
    config = out.parent / "small.toml"
    config.write_text(TOML)
    return ["--config", str(config), "--data", str(tokens), "--out", str(out), *more]


def command(tokens: Path, out: Path, *more: str) -> list[str]:
    """Return the command that starts such a run as a program."""
    return [sys.executable, "-m", "yaongi.train", *arguments(tokens, out, *more)]


def environment(**more: str) -> dict[str, str]:
    """Return an environment with one thread, so that two processes on a small machine don't slow each other down."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def train_here(words: Sequence[str]) -> int:
    """Run `python -m yaongi.train` in this process, and return the exit code; a mistake is raised."""
    return program.run(parse(words), words)


def run(tokens: Path, out: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Train in a separate process."""
    return run_module("yaongi.train", *arguments(tokens, out, *more), env=environment(**env))


def config_of(tokens: Path, out: Path, *more: str) -> Config:
    """Return the configuration of such a command line."""
    return parse(arguments(tokens, out, *more))


def session_of(tokens: Path, out: Path, *more: str) -> Session:
    """Return a started session."""
    session = Session(config_of(tokens, out, *more), ALONE)
    session.start()
    return session


def changed(config: Config, **fields: Any) -> Config:
    """Return `config` with other training fields."""
    return replace(config, train=replace(config.train, **fields))


def losses(out: Path) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of all steps of a run."""
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["gnorm"]) for r in records if r["event"] == "step"]


def final_tensors(out: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a run's newest checkpoint, by name."""
    folder = out / "checkpoints"
    whole = out.parent / f"{out.name}.pt"
    dcp_to_torch_save(folder / (folder / "latest").read_text(), whole)
    return dict(_flat(torch.load(whole), ""))


def _flat(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def final(out: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's last checkpoint, without the random generators' states."""
    return {name: tensor for name, tensor in final_tensors(out).items() if not name.startswith("rng")}


def assert_close(mine: Path, theirs: Path, loss: float, tensor: float) -> None:
    """Compare the losses and norms of all steps, and all tensors of the last checkpoints."""
    for (step, *values), (_, *wanted) in zip(losses(mine), losses(theirs), strict=True):
        assert values == pytest.approx(wanted, rel=loss), step
    got, expected = final(mine), final(theirs)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=tensor, atol=tensor, msg=name)


def assert_same(mine: Path, theirs: Path) -> None:
    """Compare them bit for bit."""
    assert losses(mine) == losses(theirs)
    got, expected = final(mine), final(theirs)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
