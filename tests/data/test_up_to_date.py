"""A stage does its work again when anything that could change its result has changed, and only then."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from texts import random_texts, write_jsonl

from yaongi.data.sources.readers import Reading
from yaongi.data.stages.tokenize_sources import Options, tokenize_sources
from yaongi.data.stages.train_tokenizer import train_on_sources
from yaongi.data.tokenizer import Tokenizer

READINGS: dict[str, dict[str, Any]] = {
    "text_field": {"text_field": "text"},
    "encoding": {"encoding": "latin-1"},
    "max_document_bytes": {"max_document_bytes": 5000},
    "bad_rows": {"bad_rows": 0.5},
}


def rename(folder: Path) -> None:
    """Rename a file: the order of the files is that of their names."""
    (folder / "train" / "law" / "a.jsonl").rename(folder / "train" / "law" / "z.jsonl")


def change(folder: Path) -> None:
    """Change one byte of a file deep in the folder, and keep its size and time."""
    path = folder / "train" / "law" / "deep" / "b.jsonl"
    before = path.stat()
    path.write_text(path.read_text().replace("a", "b", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def add(folder: Path) -> None:
    """Add a file to a source."""
    write_jsonl(folder / "train" / "law" / "c.jsonl", random_texts(3, 9))


def licence(folder: Path) -> None:
    """Change what a download says about itself."""
    (folder / "train" / "law" / "deep" / "source.json").write_text(json.dumps({"id": "x/y", "licence": "CC0"}))


def swap(folder: Path) -> None:
    """Exchange the contents of two files."""
    one, other = folder / "train" / "law" / "a.jsonl", folder / "train" / "law" / "deep" / "b.jsonl"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a source in sub-folders."""
    write_jsonl(tmp_path / "c" / "train" / "law" / "a.jsonl", random_texts(1, 60))
    write_jsonl(tmp_path / "c" / "train" / "law" / "deep" / "b.jsonl", random_texts(2, 60))
    return tmp_path / "c"


def worked(stage: Callable[[Callable[[str], None]], object]) -> bool:
    """Return whether a stage did its work, rather than finding it done."""
    said: list[str] = []
    stage(said.append)
    return not any("up to date" in line for line in said)


@pytest.mark.parametrize("damage", [rename, change, add, licence, swap])
def test_files_that_change(folder: Path, tokenizer: Tokenizer, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    def tokens(say: Callable[[str], None]) -> object:
        return tokenize_sources([str(folder)], tokenizer, tmp_path / "t", Options(), workers=1, say=say)

    def pieces(say: Callable[[str], None]) -> object:
        return train_on_sources([str(folder)], tmp_path / "p", 600, "", 100_000, say=say)

    for stage in (tokens, pieces):
        assert worked(stage)
        assert not worked(stage)
    damage(folder)
    for stage in (tokens, pieces):
        assert worked(stage) or (damage is licence and stage is pieces)
        assert not worked(stage)


def test_every_option_of_tokenize(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    benchmark = write_jsonl(tmp_path / "b.jsonl", random_texts(9, 3))
    changes: dict[str, Any] = {
        "held_out": 0.1,
        "near_duplicates": False,
        "index_bytes": 1 << 26,
        "benchmarks": (str(benchmark),),
        "shard_tokens": 3000,
    }
    everything = [{name: value} for name, value in changes.items()]
    everything += [{"reading": Reading(**reading)} for reading in READINGS.values()]
    assert {*changes, "reading"} == set(Options.__dataclass_fields__), "a new option must be here"
    assert set(READINGS) == set(Reading.__dataclass_fields__), "a new option must be here"
    for options in ({}, *everything):

        def stage(say: Callable[[str], None], options: dict[str, Any] = options) -> object:
            return tokenize_sources([str(folder)], tokenizer, tmp_path / "t", Options(**options), workers=1, say=say)

        assert worked(stage), options
        assert not worked(stage), options


def test_every_option_of_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"vocab_size": 610}, {"total_bytes": 9000}, {"mix": "law=2"}]
    changes += [{"reading": Reading(**reading)} for reading in READINGS.values()]
    for options in changes:

        def stage(say: Callable[[str], None], options: dict[str, Any] = options) -> object:
            given = {"vocab_size": 600, "mix": "", "total_bytes": 100_000, **options}
            return train_on_sources([str(folder)], tmp_path / "p", **given, say=say)

        assert worked(stage), options
        assert not worked(stage), options
