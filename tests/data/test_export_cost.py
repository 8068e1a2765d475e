"""`export --drop-engram --measure TOKENS` prints what dropping Engram costs, before anything is written."""

import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from models import ROW, SIZES, save_model
from programs import run_module

from yaongi.data.loader import Loader
from yaongi.data.tokenizer import Tokenizer
from yaongi.model import EngramConfig, ModelConfig, Yaongi, compression_map

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with Engram, whose table is large enough to matter."""
    engram = (EngramConfig(layer=1, heads=2, head_dim=4, rows=500),)
    config = ModelConfig(pattern="ME*", vocab_size=tokenizer.vocab_size, engram=engram, **SIZES)
    model = Yaongi(config, compression=compression_map(tokenizer.pieces()))
    with torch.no_grad():
        model.backbone.layers[1].engram.table.weight.mul_(50)
    return save_model(model, tokenizer, tmp_path_factory.mktemp("model"))


def export(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_module("yaongi.export", *arguments, "--device", "cpu")


@torch.no_grad()
def bits(model: Yaongi, loader: Loader, domain: str) -> float:
    """Return bits per byte of four held-out rows, computed token by token."""
    rows = loader.held_out(domain, 4)
    total = 0.0
    for ids, documents, predicted in zip(rows.input_ids, rows.document_ids, rows.predicted, strict=True):
        log = model(ids[None], documents[None])[0].double().log_softmax(-1)
        total -= sum(float(log[i - 1, ids[i]]) for i in range(1, ROW) if predicted[i])
    return total / math.log(2) / int(rows.text_bytes.sum())


def test_the_cost_is_printed_by_domain_and_right(folder: Path, shards: Path, tmp_path: Path) -> None:
    options = ("--drop-engram", "--measure", str(shards), "--measure-rows", "4")
    done = export(str(folder), "--out", str(tmp_path / "hub"), *options)
    assert done.returncode == 0, done.stderr
    head, *lines, last = done.stdout.splitlines()
    assert head.startswith(
        "bits per byte on held-out rows of 64 tokens (ko 4, en 4, code 4, math 4), with and without "
    )
    assert "the Engram of layer 1 with " in head
    assert last == f"wrote {tmp_path / 'hub'}"
    loader = Loader(shards, row_tokens=ROW, batch_rows=1)
    models = [Yaongi.from_pretrained(path) for path in (folder, tmp_path / "hub")]
    assert len(lines) == 4
    for line in lines:
        domain, before, after = re.findall(r"\w+|[\d.]+", line.replace(".", "_"))[:3]
        for printed, model in zip((before, after), models, strict=True):
            assert float(printed.replace("_", ".")) == pytest.approx(bits(model, loader, domain), abs=6e-4)
        assert before != after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "export: --out, --gguf or --push-to must be given, got none"),
        (("--out", "{folder}"), "export: --out must be another folder than the model's or a run's, got {folder}"),
        (("--out", "{out}", "--measure", "{out}"), "{out}"),
        (("--out", "{out}"), "--drop-engram leaves that out"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "hub"
    done = export(str(folder), *(argument.format(folder=folder, out=out) for argument in arguments))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message.format(folder=folder, out=out) in done.stderr
    assert not out.exists()
