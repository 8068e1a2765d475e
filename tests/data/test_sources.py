"""Local files as sources, in every format, and clear errors for files that can't be read."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from texts import read_documents, write_jsonl

from yaongi.data.sources.readers import read_rows
from yaongi.data.sources.specs import open_sources

TEXTS = ["첫 글\n둘째 줄", "second", "x²"]
LINES = "".join(json.dumps({"text": text, "extra": {"n": 1}}) + "\n" for text in TEXTS).encode()


def test_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(LINES))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(LINES[:30]) + zstandard.compress(LINES[30:]))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(LINES))
    parquet.write_table(pyarrow.table({"text": TEXTS, "n": [1, 2, 3]}), tmp_path / "e.parquet", row_group_size=2)
    (source,) = open_sources([f"ko={tmp_path}"])
    assert list(source.documents()) == TEXTS * 5
    for path in tmp_path.iterdir():
        with path.open("rb") as file:
            assert [row["text"] for row in read_rows(file, path.name, ["text"], 2)] == TEXTS[2:]


def test_text_files_are_documents_and_long_ones_are_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("한 글\r\n끝".encode())
    line = "가" * 99 + "\n"
    (tmp_path / "b.txt").write_text(line * 2000)
    documents = [d for source in open_sources([f"ko={tmp_path}"]) for d in source.documents()]
    assert documents[0] == "한 글\n끝"
    assert len(documents) == 5
    assert "".join(documents[1:]) == line * 2000


def test_messages_are_rendered(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    (text,) = read_documents(tmp_path / "a.jsonl")
    assert text == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"content": "x"}]}))
    with pytest.raises(ValueError, match="every message must have a role"):
        list(read_documents(tmp_path / "a.jsonl"))


def test_a_folder_with_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train" / "ko.jsonl", ["가"])
    write_jsonl(tmp_path / "val" / "ko.jsonl", ["나"])
    write_jsonl(tmp_path / "train" / "en" / "wiki" / "part-0.jsonl", ["a"])
    write_jsonl(tmp_path / "train" / "en" / "web" / "part-0.jsonl", ["b"])
    about = {"id": "owner/wiki", "licence": "CC0"}
    (tmp_path / "train" / "en" / "wiki" / "source.json").write_text(json.dumps(about))
    found = [(s.domain, s.split, s.name, s.licence, list(s.documents())) for s in open_sources([str(tmp_path)])]
    assert found == [
        ("ko", "train", "ko", "not stated", ["가"]),
        ("ko", "val", "ko", "not stated", ["나"]),
        ("en", None, "web", "not stated", ["b"]),
        ("en", None, "owner/wiki", "CC0", ["a"]),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "row 1: not JSON"),
        ("a.jsonl", b"[1]\n", "must be a JSON object, got list"),
        ("a.jsonl", b'{"body": "x"}\n', r"row 0: one of .* must hold text, got fields \['body'\]"),
        ("a.jsonl", b'{"text": "\xff"}\n', "cannot be read"),
        ("a.jsonl.xz", lzma.compress(LINES)[:60], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:40], "cannot be read"),
        ("a.jsonl.zst", b"not zstd at all", "cannot be read"),
        ("a.parquet", b"PAR1 no", "not a whole parquet"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_documents(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("ending", ["xz", "gz", "bz2", "zst"])
def test_a_compressed_file_that_ends_early_or_was_altered_is_refused(tmp_path: Path, ending: str) -> None:
    """Even where all of its rows came before the end; a whole one, in two frames, is read."""
    checked = zstandard.ZstdCompressor(write_checksum=True).compress
    pack = {"xz": lzma.compress, "gz": gzip.compress, "bz2": bz2.compress, "zst": checked}[ending]
    whole = pack(LINES[:30]) + pack(LINES[30:])
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(whole)
    assert list(read_documents(path)) == TEXTS
    garbage = (b"more", b"more than a few bytes", b"\0" * 8 + b"more than a few bytes")
    for content in (
        whole[:-1],
        whole[:-20],
        *(pack(LINES) + more for more in garbage),
        b"not compressed",
        whole[:20] + b"??" + whole[22:],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"a.jsonl.{ending} cannot be read") as caught:
            list(read_documents(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip"])
def test_an_altered_parquet_file_is_refused(tmp_path: Path, compression: str) -> None:
    """If it has checksums; in one line that names it."""
    texts = [f"글 {number} " * 9 for number in range(300)]
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table({"text": texts}), path, compression=compression, use_dictionary=False, write_page_checksum=True
    )
    whole = path.read_bytes()
    for place in range(300, len(whole) - 700, len(whole) // 20):  # its pages
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"a.parquet is not a whole parquet file") as caught:
            list(read_documents(path))
        assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_field(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"one of .* must hold text, got fields \['body'\] \(--text-field"):
        list(read_documents(tmp_path / "a.parquet"))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such source"):
        open_sources([str(tmp_path / "none")])
    with pytest.raises(FileNotFoundError, match="got none"):
        open_sources([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="got none"):
        open_sources([f"ko={tmp_path}"])
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="got none"):
        open_sources([str(tmp_path)])
    with pytest.raises(ValueError, match="--source"):
        open_sources([])
