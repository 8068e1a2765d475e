"""Hugging Face's own hub client against a small local server that speaks the hub's protocol."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from hub_server import COMMIT, hub_environment, serve_hub
from pyarrow import parquet
from texts import read_documents

from yaongi.data.sources.patience import Patience
from yaongi.data.sources.row_sources import hub_rows
from yaongi.data.tokenizer import Tokenizer

SET = "HuggingFaceTB/finemath"
CARD = """---
configs:
- config_name: news
  data_files:
  - split: train
    path: news/[0-9]*
  - split: test
    path: news/held-*
- config_name: law
  data_files: law/*
---
"""


def packed(**columns: list[str]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Serve a data set of the public mix and two others; return the address and the list of requests received."""
    sets = {
        SET: {
            "finemath-4plus/train-0.parquet": packed(text=["1 + 1 = 2", "2 + 2 = 4"], url=["a", "b"]),
            "README.md": b"",
        },
        "me/one": {"train.jsonl": b'{"text": "a"}\n{"text": "b"}\n', "test.jsonl": b'{"text": "no"}\n'},
        "me/table": {"train.csv": 'document,label\n"하나, 둘\n셋",1\n넷,0\n'.encode()},
        "me/talks": {
            "train.parquet": packed(prompt=["몇?", "왜?"], completion=["둘", ""]),
            "test.parquet": packed(prompt=["no"], completion=["no"]),
        },
        "me/many": {
            "README.md": CARD.encode(),
            "news/1.parquet": packed(body=["소식 하나", "소식 둘"], title=["x", "y"]),
            "news/held-1.parquet": packed(body=["no"]),
            "law/1.txt": "제1조".encode(),
            "law/2.arrow": b"no",
        },
    }
    with serve_hub(sets) as server:
        yield server


def run_download(endpoint: str, out: Path, *arguments: str, script: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import yaongi.data.sources.patience as p; {script}\nfrom yaongi.data.__main__ import main; main()"
    command = [sys.executable, "-c", code, "download", "--out", str(out), "--tokens", "1000", *arguments]
    environment = hub_environment(endpoint, str(out / "home"))
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_conversations_come_from_the_hub(hub: tuple[str, list[str]], tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "yaongi.data", "chat", "--tokenizer", str(tmp_path / "tokenizer"), "--val", "0"]
    for source, code, said in (
        ("hf:me/talks", 0, "lost, empty answer              1              2"),
        ("hf:me/nothing", 1, "error: download: me/nothing is not to be had"),
        ("hf:me/talks:default:dev", 1, "error: data: the split of me/talks must be one of train, test, got dev"),
    ):
        options = ["--source", source, "--out", str(tmp_path / "chat"), "--show", "1", "--workers", "1"]
        environment = hub_environment(hub[0], str(tmp_path / "home"))
        done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
        assert done.returncode == code, done.stderr
        assert said in (done.stderr if code else done.stdout)
        assert "Traceback" not in done.stderr
        assert code or "⟦둘<|im_end|>⟧" in done.stdout


def test_a_connection_that_breaks_goes_on_with_the_next_row() -> None:
    lines = b"".join(json.dumps({"prompt": str(n), "completion": "x"}).encode() + b"\n" for n in range(20000))
    opened: list[int] = []

    class Breaking(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            if len(opened) < 3 and self.tell() > len(opened) * 200_000:
                raise ConnectionResetError("reset")
            return super().read1(size)

    class Repository:
        def open(self, name: str) -> io.BytesIO:
            opened.append(1)
            return Breaking(lines)

    slept: list[float] = []
    patience = Patience("me/talks", lambda _: None, slept.append)
    rows = list(hub_rows(Repository(), "train.jsonl", patience))  # type: ignore[arg-type]
    assert [row["prompt"] for row in rows if isinstance(row, dict)] == [str(n) for n in range(20000)]
    assert len(opened) == 3
    assert len(slept) == 2


def texts(folder: Path) -> list[str]:
    return [text for path in sorted(folder.glob("part-*")) for text in read_documents(path)]


def test_a_data_set_comes_at_a_pinned_commit(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, requests = hub
    done = run_download(endpoint, tmp_path / "raw", "--only", "finemath")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "raw" / "train" / "math" / "finemath" / "source.json").read_text())
    assert (record["id"], record["revision"], record["licence"], record["documents"]) == (SET, COMMIT, "odc-by", 2)
    assert any(f"/resolve/{COMMIT}/" in request for request in requests)
    assert "2 documents" in done.stdout


def test_any_data_set_by_its_name(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    """The train split alone, of the subset that is named."""
    raw = tmp_path / "raw"
    done = run_download(hub[0], raw, "--source", "hf:me/one", "--source", "소식=hf:me/many:news")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "one of ['text'] must hold text, got fields ['body', 'title'] (--text-field names another)" in done.stderr
    assert texts(raw / "train" / "one" / "me--one") == ["a", "b"]
    done = run_download(hub[0], raw, "--source", "소식=hf:me/many:news", "--text-field", "body")
    assert done.returncode == 0, done.stderr
    assert texts(raw / "train" / "소식" / "me--many--news") == ["소식 하나", "소식 둘"]
    done = run_download(hub[0], raw, "--source", "hf:me/table", "--text-field", "document")
    assert done.returncode == 0, done.stderr
    assert texts(raw / "train" / "table" / "me--table") == ["하나, 둘\n셋", "넷"]
    done = run_download(hub[0], raw, "--source", "소식=hf:me/many:news", "--text-field", "title")
    assert "must be from field title, got body; remove it to download again" in done.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:me/many", "the subset of me/many must be one of news, law, got none"),
        ("hf:me/many:sport", "the subset of me/many must be one of news, law, got sport"),
        ("hf:me/many:law", "files of me/many must be .txt .jsonl .ndjson .json .parquet .csv .tsv, got law/2.arrow"),
        ("hf:me/nothing", "me/nothing is not to be had"),
        ("hf:one", "source must be hf:OWNER/NAME, hf:OWNER/NAME:SUBSET or DOMAIN=hf:…, got 'hf:one'"),
    ],
)
def test_what_can_not_be_downloaded_is_one_line(
    hub: tuple[str, list[str]], tmp_path: Path, source: str, message: str
) -> None:
    done = run_download(hub[0], tmp_path / "raw", "--source", source)
    assert done.returncode == 1
    assert done.stderr.startswith("error: download: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_network_is_one_line(tmp_path: Path) -> None:
    done = run_download("http://127.0.0.1:9", tmp_path / "raw", "--only", "finemath", script="p.TRIES = 2")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: download: HuggingFaceTB/finemath not reached in 2 tries")
