"""Fifteen billion tokens, rehearsed: what a stage will take is said first; shards that are holes open and resume."""

import hashlib
import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from test_download import SOURCE, places
from texts import PEAK, random_texts, write_jsonl

from yaongi.data.shards import TOKEN_BYTES, Shard, write_manifest
from yaongi.data.sources.hub import HUB_SOURCES
from yaongi.data.stages import forecast
from yaongi.data.stages.download import download, public_mix
from yaongi.data.stages.tokenize_sources import Options, tokenize_sources
from yaongi.data.tokenizer import Tokenizer

Usage = namedtuple("Usage", ("total", "used", "free"))


def free_disk(monkeypatch: pytest.MonkeyPatch, count: float) -> None:
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda _: Usage(0, 0, int(count)))


def test_a_download_checks_the_disk_and_says_hours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    free_disk(monkeypatch, 20e9)
    with pytest.raises(OSError, match=r"download: the disk of .*raw must have 30.6 GB free, got 20.0 GB"):
        download(tmp_path / "raw", 15e9, places(tmp_path), public_mix(), say=said.append)
    assert said == ["to download: up to 61.1 GB of text, 30.6 GB on the disk, 51 minutes at 20.0 MB/s"]
    assert not (tmp_path / "raw").exists()


def test_what_is_there_needs_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    write_jsonl(tmp_path / "owner" / "set" / "data" / "a.jsonl", random_texts(1, 9))
    for free in (1e9, 0):
        free_disk(monkeypatch, free)
        download(tmp_path / "raw", 1e9, places(tmp_path), {("en", "set"): SOURCE}, say=said.append)
    assert [line for line in said if line.startswith("to download")] == [
        "to download: up to 0.4 GB of text, 0.2 GB on the disk, 1 minute at 20.0 MB/s",
        "to download: up to 0.0 MB of text, 0.0 MB on the disk, 1 minute at 20.0 MB/s",
    ]


def test_tokenize_checks_the_disk_and_says_hours(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    said: list[str] = []
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(60_000_000_000)
    free_disk(monkeypatch, 20e9)
    monkeypatch.setattr("yaongi.data.sources.specs.sha256_file", lambda _: "")
    with pytest.raises(OSError, match=r"tokenize: the disk of .*t must have 39.0 GB free, got 20.0 GB"):
        tokenize_sources([f"ko={path}"], tokenizer, tmp_path / "t", Options(), workers=2, say=said.append)
    assert said == ["to tokenize: about 60.0 GB of text to 39.0 GB of shards, 2.1 hours on 2 cores"]
    assert not (tmp_path / "t.building").exists()


def holes(folder: Path, tokenizer: Tokenizer, tokens: int) -> Path:
    """Write a folder of shards for the public mix that is all holes: every id is 0, every document is of 800 tokens."""
    tokenizer.save(folder / "tokenizer")
    np.save(folder / TOKEN_BYTES, tokenizer.byte_lengths)
    about = (folder / TOKEN_BYTES).read_bytes()
    (folder / "train").mkdir()
    shards: dict[str, list[Shard]] = {}
    sums: dict[int, str] = {}
    checked = {TOKEN_BYTES: [hashlib.sha256(about).hexdigest(), len(about), (folder / TOKEN_BYTES).stat().st_mtime_ns]}
    for number, source in enumerate(HUB_SOURCES.values()):
        left, part = int(tokens * source.share / 100), 0
        while left > 0:
            size = min(left, 100_000_000)
            names = [f"train/{source.domain}-{number:02d}-{part:05d}.{ending}" for ending in ("bin", "idx")]
            for name, length in zip(names, (2 * size, size // 800 * 16), strict=True):
                with (folder / name).open("wb") as file:
                    file.truncate(length)
                if length not in sums:
                    with (folder / name).open("rb") as file:
                        sums[length] = hashlib.file_digest(file, "sha256").hexdigest()
                checked[name] = [sums[length], length, (folder / name).stat().st_mtime_ns]
            shards.setdefault(source.domain, []).append(
                Shard(*names, checked[names[0]][0], checked[names[1]][0], size, 4 * size, size // 800, source.id, "x")
            )
            left, part = left - size, part + 1
    planned: dict[str, dict[str, float]] = {}
    for source in HUB_SOURCES.values():
        planned.setdefault(source.domain, {})[source.id] = source.share
    write_manifest(
        folder,
        {"train": shards, "val": {}},
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        token_bytes_sha256=str(checked[TOKEN_BYTES][0]),
        token_bytes_size=len(about),
        shares=planned,
        counts={},
    )
    (folder / ".verified.json").write_text(json.dumps(checked))
    return folder


SCRIPT = (
    PEAK
    + """
import json, sys, time
from yaongi.data.loader import Loader
before, began = peak(), time.perf_counter()
loader = Loader(sys.argv[1], row_tokens=4096, batch_rows=256)
opened = time.perf_counter() - began
loader.batch(0)
state = json.loads(json.dumps({**loader.state_dict(), "samples": 14_000 * 256}))
began = time.perf_counter()
other = Loader(sys.argv[1], row_tokens=4096, batch_rows=256)
other.load_state_dict(state)
batch = next(other.stream())
resumed = time.perf_counter() - began
print(json.dumps({"tokens": sum(loader.tokens.values()), "streams": len(loader.streams), "opened": opened,
    "resumed": resumed, "sample": batch.samples[0].item(), "kilobytes": peak() - before}))
"""
)


def rehearse(folder: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, check=True)
    print(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.parametrize("tokens", [1_000_000_000, pytest.param(15_000_000_000, marks=pytest.mark.long)])
def test_shards_that_are_holes_open_and_resume(tokenizer: Tokenizer, tmp_path: Path, tokens: int) -> None:
    """In memory that doesn't grow with the tokens; the times are printed."""
    found = rehearse(holes(tmp_path / "t", tokenizer, tokens))
    assert found["tokens"] == tokens
    assert found["streams"] == len(HUB_SOURCES)
    assert found["sample"] == 14_000 * 256
    assert found["kilobytes"] < 400_000
    at_exit = "import atexit, runpy, sys; atexit.register(lambda: print(peak(), file=sys.stderr))"
    plan = f"{PEAK}\n{at_exit}; runpy.run_module('yaongi.train', run_name='__main__', alter_sys=True)"
    arguments = ["--preset", "yaongi-4b", "--data", str(tmp_path / "t"), "--dry-run", "--tokens", str(tokens)]
    planned = subprocess.run([sys.executable, "-c", plan, *arguments], capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    assert f"ko/KORMo-Team/Cosmopedia-ko-synth: {tokens // 10:,} tokens there, " in planned.stdout
    assert int(planned.stderr.splitlines()[-1]) < 1_500_000, "kilobytes"
