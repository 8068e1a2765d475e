"""`python -m yaongi.eval bpb`: bits per byte by domain, of held-out rows and of texts."""

import math
import subprocess
import unicodedata
from pathlib import Path

import pytest
import torch
from models import ROW, SIZES, save_model
from programs import run_module

from yaongi.data.loader import Loader
from yaongi.data.tokenizer import Tokenizer
from yaongi.model import ModelConfig, Yaongi

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small model whose logits are far from even."""
    model = Yaongi(ModelConfig(pattern="M*", vocab_size=tokenizer.vocab_size, **SIZES))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return save_model(model, tokenizer, tmp_path_factory.mktemp("model"))


def bpb(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command on a CPU."""
    return run_module("yaongi.eval", "bpb", *arguments, "--device", "cpu")


def printed(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """Return the words of each line by the first of them."""
    assert done.returncode == 0, done.stderr
    return {words[0]: words[1:] for words in map(str.split, done.stdout.splitlines())}


@torch.no_grad()
def nats(model: Yaongi, ids: torch.Tensor, documents: torch.Tensor, counted: torch.Tensor) -> float:
    """Return the nats of the counted tokens (L) of a row, one after another."""
    log = model(ids[None], documents[None])[0].double().log_softmax(-1)
    return -sum(float(log[i - 1, ids[i]]) for i in range(1, len(ids)) if counted[i])


@pytest.mark.parametrize("rows", [0, 3])
def test_held_out_rows_by_domain(rows: int, folder: Path, shards: Path) -> None:
    """Of each domain all rows or some, as a loop over tokens finds them."""
    model, loader = Yaongi.from_pretrained(folder), Loader(shards, row_tokens=ROW, batch_rows=1)
    found = printed(bpb(folder, "--data", shards, "--rows", rows))
    placed = bpb(folder, "--data", shards, "--rows", rows, "--by-position").stdout
    values = []
    for domain in loader.domains:
        held_out = loader.held_out(domain, rows or 10**6)
        total = sum(
            nats(model, *row) for row in zip(held_out.input_ids, held_out.document_ids, held_out.predicted, strict=True)
        )
        values.append(total / math.log(2) / int(held_out.text_bytes.sum()))
        assert float(found[domain][0]) == pytest.approx(values[-1], abs=6e-5)
        assert f"{domain} by position: 0-{ROW - 1} {found[domain][0]}" in placed, "all of a short row is one bucket"
        assert int(found[domain][1].replace(",", "")) == len(held_out.input_ids)
    assert float(found["mean"][0]) == pytest.approx(sum(values) / len(values), abs=6e-5)


def test_texts_of_ones_own(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Korean in NFD has the bits of the same text in NFC; a text of several rows counts all but their first tokens."""
    text = "오늘은 비가 와서 집에 있었다. 고양이는 창가에서 잤다.\n" * 12
    (tmp_path / "nfc.txt").write_text(text)
    (tmp_path / "nfd.txt").write_text(unicodedata.normalize("NFD", text))
    found = printed(bpb(folder, "--text", tmp_path / "nfc.txt", "--text", f"ko={tmp_path / 'nfd.txt'}"))
    assert found["ko"] == found["nfc"]
    model, ids = Yaongi.from_pretrained(folder), torch.tensor(tokenizer.encode(text))
    total, size = 0.0, 0
    for row in ids.split(ROW):
        total += nats(model, row, torch.zeros(len(row), dtype=torch.int32), torch.ones(len(row)))
        size += int(tokenizer.byte_lengths[row[1:]].sum())
    assert float(found["ko"][0]) == pytest.approx(total / math.log(2) / size, abs=6e-5)
    assert found["ko"][1:] == [f"{-(-len(ids) // ROW)}", "rows", f"{size:,}", "bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "bpb: --data or --text must be given, got neither"),
        (("--text", "{folder}/none.txt"), "{folder}/none.txt"),
        (("--text", "{folder}/tokenizer.model"), "bpb: --text must be UTF-8, got {folder}/tokenizer.model with "),
        (("--data", "{folder}"), "shards: no manifest.json in {folder}; make it with "),
        (
            ("--data", "{shards}", "--row-tokens", "65"),
            "bpb: --row-tokens must be 2 to the model's max_sequence_length",
        ),
        (("--data", "{shards}", "--rows", "-1"), "bpb: --rows must be 0 or more, got -1"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str, folder: Path, shards: Path) -> None:
    done = bpb(folder, *(word.format(folder=folder, shards=shards) for word in arguments))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message.format(folder=folder) in done.stderr
