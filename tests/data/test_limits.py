"""Input at the limits: long lines, deep nesting, large windows, padding, workers that die; one line each, no loss."""

import json
import lzma
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from texts import PEAK, random_texts, read_documents, write_jsonl

from yaongi.data.shards import ShardSet
from yaongi.data.sources.readers import Reading
from yaongi.data.sources.specs import open_sources
from yaongi.data.stages.processes import worker_pool
from yaongi.data.stages.tokenize_sources import Options, tokenize_sources
from yaongi.data.text import cut
from yaongi.data.tokenizer import Tokenizer


def test_a_padded_xz_is_read_to_its_end(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in ("a", "b")]
    path = tmp_path / "a.jsonl.xz"
    for padding in (b"", b"\0" * 4, b"\0" * 100_000):
        path.write_bytes(lzma.compress(lines[0]) + padding + lzma.compress(lines[1]) + padding)
        assert list(read_documents(path)) == ["a", "b"]


def test_a_zst_with_a_large_window_is_one_line(tmp_path: Path) -> None:
    settings = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False)
    with (tmp_path / "a.jsonl.zst").open("wb") as file:
        with zstandard.ZstdCompressor(compression_params=settings).stream_writer(file, closefd=False) as writer:
            writer.write(b'{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl.zst cannot be read: its window is larger than 128 MB: .* --long=27"):
        list(read_documents(tmp_path / "a.jsonl.zst"))


def test_json_that_is_nested_deeply_is_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    deep = "[" * 10_000 + "]" * 10_000
    path = write_jsonl(tmp_path / "a" / "a.jsonl", random_texts(1, 30))
    with path.open("a") as file:
        file.write(f'{{"text": "x", "more": {deep}}}\n')
    options = Options(benchmarks=(str(tmp_path / "b.jsonl"),))
    said: list[str] = []
    for depth in (400, 10_000):
        (tmp_path / "b.jsonl").write_text(f'{{"question": {"[" * depth + "]" * depth}}}\n')
        with pytest.raises(ValueError, match=r"b.jsonl") as caught:
            tokenize_sources([f"ko={path}"], tokenizer, tmp_path / "t", options, workers=1, say=said.append)
        assert "\n" not in str(caught.value)
    tokenize_sources([f"ko={path}"], tokenizer, tmp_path / "t", Options(), workers=1, say=said.append)
    assert any("a.jsonl, row 30: not JSON" in line for line in said)
    for name in ("manifest.json", ".verified.json"):
        (tmp_path / "t" / name).write_text(deep)
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        ShardSet.open(tmp_path / "t")
    (path.parent / "source.json").write_text(deep)
    with pytest.raises(ValueError, match=r"source.json: must be JSON, got "):
        open_sources([f"ko={path.parent}"])


def test_long_texts_are_cut_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = random_texts(1, 20, words=900)
    folder = tmp_path / "c"
    write_jsonl(folder / "a.jsonl", [" ".join(texts), "short enough"])
    (folder / "b.txt").write_text("".join(texts).replace(" ", ""))
    reading = Reading(max_document_bytes=20_000)
    said: list[str] = []
    manifest = tokenize_sources(
        [f"en={folder}"], tokenizer, tmp_path / "t", Options(reading=reading), workers=1, say=said.append
    )
    assert manifest["counts"]["en/c"]["cut"] == 2
    assert any(", 2 cut" in line for line in said)
    (source,) = open_sources([f"en={folder}"], reading)
    documents = list(source.documents())
    assert max(len(text.encode()) for text in documents) <= 20_000
    assert "".join(documents) == f"{' '.join(texts)}short enough{''.join(texts).replace(' ', '')}"
    with pytest.raises(ValueError, match="max_document_bytes must be 1000 or more, got 10"):
        Reading(max_document_bytes=10)


def test_a_line_that_is_far_too_long_is_a_bad_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a", "x" * 40_000, "b"])
    said: list[str] = []
    (source,) = open_sources([f"en={tmp_path / 'a.jsonl'}"], Reading(max_document_bytes=1000), said.append)
    assert list(source.documents()) == ["a", "b"]
    assert "a.jsonl, row 1: line too long (--max-document-bytes allows longer ones)" in said[0]


def test_parts_of_a_text_are_cut_at_blanks() -> None:
    assert cut("가나 다라 마바", 13) == ["가나 ", "다라 ", "마바"]
    assert cut("ab cd ef", 20) == ["ab cd ef"]
    assert cut("ab cd\nef ghijklmn", 16) == ["ab ", "cd\n", "ef ", "ghij", "klmn"]


def test_memory_of_one_long_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A line of 30 MB takes less than 800 MB; without a limit it took 38 times its size."""
    path = write_jsonl(tmp_path / "a.jsonl", random_texts(1, 20))
    with path.open("a") as file:
        file.write(json.dumps({"text": " ".join(random_texts(2, 1, words=60_000) * 60)}, ensure_ascii=False))
    assert 30e6 < path.stat().st_size < 60e6
    tokenizer.save(tmp_path / "tokenizer")
    script = f"{PEAK}\nfrom yaongi.data.__main__ import main; main(); print(peak())"
    arguments = ["tokenize", "--source", f"en={path}", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "t"]
    command = [sys.executable, "-c", script, *arguments, "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 800_000, "kilobytes"


class Dying:
    """A worker that is killed, as the system does when memory runs out."""

    def __call__(self, texts: list[str]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_line() -> None:
    with pytest.raises(ChildProcessError, match=r"a worker process was killed, .*; run again, with fewer --workers"):
        with worker_pool(Dying(), 2, "tokenize") as process:
            list(process(iter([["x"], ["y"]])))
