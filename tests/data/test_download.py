"""Downloads of hub sources from a mirror folder: resumed without a gap or duplicate, within budget, never empty."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pyarrow
import pytest
from pyarrow import parquet
from texts import random_texts, read_documents, write_jsonl

from yaongi.data.sources.hub import FALLBACKS, HUB_SOURCES, HubSource, MirrorRepository
from yaongi.data.sources.specs import open_sources
from yaongi.data.stages.download import Places, Progress, download, download_source, public_mix

SOURCE = HubSource("en", 10, "owner/set", ("data/*",))
TEXTS = random_texts(11, 300)
ALL = 10**9


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """Return a mirror with `owner/set`: three data files of both formats, and a file that isn't data."""
    folder = tmp_path / "mirror" / "owner" / "set"
    write_jsonl(folder / "data" / "a.jsonl", TEXTS[:100])
    write_jsonl(folder / "data" / "b.jsonl", TEXTS[100:200])
    table = pyarrow.table({"text": TEXTS[200:], "metadata": [{"k": i} for i in range(100)]})
    parquet.write_table(table, folder / "data" / "c.parquet", row_group_size=30)
    (folder / "README.md").write_text("a card")
    return tmp_path / "mirror"


def places(mirror: Path, **changes: Any) -> Places:
    return replace(Places.of(mirror), sleep=lambda _: None, part_bytes=8_000, **changes)


def documents(folder: Path) -> list[str]:
    return [text for path in sorted(folder.glob("part-*")) for text in read_documents(path)]


def fetch(folder: Path, at: Places, budget: int = ALL, source: HubSource = SOURCE) -> Progress:
    return download_source(source, folder, budget, at, say=lambda _: None)


def test_everything_arrives_once(mirror: Path, tmp_path: Path) -> None:
    progress = fetch(tmp_path / "out", places(mirror))
    assert sorted(documents(tmp_path / "out")) == sorted(TEXTS)
    assert progress.documents == 300
    assert progress.bytes == sum(len(text.encode()) for text in TEXTS)
    assert progress.parts == len(list((tmp_path / "out").glob("part-*"))) > 3
    assert json.loads((tmp_path / "out" / "source.json").read_text())["done"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    fetch(tmp_path / "out", places(mirror))
    assert {p: t for p, t in before.items() if p.name != "source.json"} == {
        p: p.stat().st_mtime_ns for p in before if p.name != "source.json"
    }


class Breaking:
    """A repository whose connection breaks after `after` reads of a file, `times` times in all."""

    def __init__(self, inner: MirrorRepository, error: type[BaseException], after: int, times: int) -> None:
        self.inner, self.error, self.after, self.times = inner, error, after, times
        self.revision, self.licence = "abc", "CC0"

    def names(self) -> list[str]:
        return self.inner.names()

    def open(self, name: str) -> IO[bytes]:
        file = self.inner.open(name)
        read, left = file.read, self.after

        def breaking_read(*args: int) -> bytes:
            nonlocal left
            left -= 1
            if left < 0 and self.times > 0:
                self.times -= 1
                raise self.error("connection lost")
            return read(*args)

        return Slow(file, breaking_read)  # type: ignore[return-value]


class Slow:
    """A file with another `read`; a context manager that TextIOWrapper iterates through `read1`."""

    def __init__(self, file: IO[bytes], read: Any) -> None:
        self.file, self._read = file, read
        self.closed, self.readable, self.writable, self.seekable = False, lambda: True, lambda: False, file.seekable
        self.seek, self.tell, self.flush = file.seek, file.tell, lambda: None

    def read(self, size: int = -1) -> bytes:
        return self._read(size)

    def read1(self, size: int = -1) -> bytes:
        return self._read(min(size, 1000))

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Slow":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.file)


def breaking(mirror: Path, error: type[BaseException], after: int, times: int) -> Places:
    repository = Breaking(MirrorRepository(mirror, SOURCE), error, after, times)
    return replace(places(mirror), repository=lambda *_: repository)


@pytest.mark.parametrize("after", [0, 3, 9, 17])
def test_an_interrupted_download_goes_on_without_gap_or_repetition(mirror: Path, tmp_path: Path, after: int) -> None:
    fetch(tmp_path / "whole", places(mirror))
    for times in range(4):
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path / "out", breaking(mirror, KeyboardInterrupt, after + times, 1))
    fetch(tmp_path / "out", places(mirror))
    assert documents(tmp_path / "out") == documents(tmp_path / "whole")
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_broken_connection_is_tried_again(mirror: Path, tmp_path: Path) -> None:
    progress = fetch(tmp_path / "out", breaking(mirror, ConnectionResetError, 4, 4))
    assert sorted(documents(tmp_path / "out")) == sorted(TEXTS)
    assert (progress.revision, progress.licence) == ("abc", "CC0")
    slept: list[float] = []
    dead = replace(breaking(mirror, TimeoutError, 0, 100), sleep=slept.append)
    with pytest.raises(ConnectionError, match="owner/set not reached in 6 tries: TimeoutError"):
        fetch(tmp_path / "other", dead)
    assert slept == [2, 4, 8, 16, 32]


def test_the_budget_stops_and_a_larger_one_goes_on(mirror: Path, tmp_path: Path) -> None:
    progress = fetch(tmp_path / "out", places(mirror), budget=20_000)
    assert 20_000 <= progress.bytes < 20_600
    kept = documents(tmp_path / "out")
    fetch(tmp_path / "out", places(mirror), budget=40_000)
    assert documents(tmp_path / "out")[: len(kept)] == kept
    assert len(set(documents(tmp_path / "out"))) == len(documents(tmp_path / "out")) > len(kept)


def test_no_rows_is_an_error(mirror: Path, tmp_path: Path) -> None:
    write_jsonl(mirror / "owner" / "empty" / "data" / "a.jsonl", [" "])
    with pytest.raises(ValueError, match=r"owner/empty gave no rows with text \(skipped: \{'empty': 1\}\)"):
        fetch(tmp_path / "out", places(mirror), source=replace(SOURCE, id="owner/empty"))
    with pytest.raises(ValueError, match="no data files that match nothing"):
        fetch(tmp_path / "out", places(mirror), source=replace(SOURCE, files=("nothing",)))


def test_rows_that_are_no_text_are_counted_and_left_out(mirror: Path, tmp_path: Path) -> None:
    write_jsonl(mirror / "owner" / "odd" / "data" / "a.jsonl", ["good", "", "bad \ud800"])
    progress = fetch(tmp_path / "out", places(mirror), source=replace(SOURCE, id="owner/odd"))
    assert progress.skipped == {"empty": 1, "bad": 1}
    assert documents(tmp_path / "out") == ["good"]


def test_messages_become_chat(mirror: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}], "id": 1}]
    folder = mirror / "allenai" / "Dolci-Think-SFT-Python"
    folder.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    fetch(tmp_path / "out", places(mirror), source=HUB_SOURCES["dolci-python"])
    assert documents(tmp_path / "out") == ["<|im_start|>user\nhi<|im_end|>\n"]


def stack_edu(mirror: Path, blobs: dict[str, bytes]) -> None:
    folder = mirror / "HuggingFaceTB" / "stack-edu" / "Python"
    folder.mkdir(parents=True)
    rows = [{"blob_id": blob, "src_encoding": "cp949" if blob == "k" else "UTF-8"} for blob in (*blobs, "missing")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    contents = mirror / "softwareheritage" / "content"
    contents.mkdir(parents=True)
    for blob, content in blobs.items():
        (contents / blob).write_bytes(content)


def test_stack_edu_takes_its_contents_from_software_heritage(mirror: Path, tmp_path: Path) -> None:
    blobs = {"a": gzip.compress(b"x = 1\n"), "k": gzip.compress("# 한글\n".encode("cp949")), "bad": b"no gzip"}
    stack_edu(mirror, blobs)
    progress = fetch(tmp_path / "out", places(mirror), source=HUB_SOURCES["stack-edu"])
    assert documents(tmp_path / "out") == ["x = 1\n", "# 한글\n"]
    assert progress.skipped == {"empty": 2}


def test_stack_edu_falls_back_when_no_content_is_to_be_had(mirror: Path, tmp_path: Path) -> None:
    stack_edu(mirror, {})
    write_jsonl(mirror / FALLBACKS["python-edu"].id / "a.jsonl", ["y = 2\n"])
    progress = fetch(tmp_path / "out", places(mirror), source=HUB_SOURCES["stack-edu"])
    assert progress.id == "Avelina/python-edu-cleaned"
    assert documents(tmp_path / "out") == ["y = 2\n"]
    again = fetch(tmp_path / "out", places(mirror), source=HUB_SOURCES["stack-edu"])
    assert again.documents == 1


def test_the_whole_mix_is_a_source_for_the_next_stage(mirror: Path, tmp_path: Path) -> None:
    names = ("korean-synthetic", "fineweb-edu", "finemath")
    write_jsonl(mirror / HUB_SOURCES["korean-synthetic"].id / "x.jsonl", ["한국어"])
    write_jsonl(mirror / HUB_SOURCES["fineweb-edu"].id / "sample" / "10BT" / "x.jsonl", ["web"])
    write_jsonl(mirror / HUB_SOURCES["fineweb-edu"].id / "data" / "x.jsonl", ["not this one"])
    write_jsonl(mirror / HUB_SOURCES["finemath"].id / "finemath-4plus" / "x.jsonl", ["1 + 1"])
    download(tmp_path / "raw", 1e6, places(mirror), public_mix(names), say=lambda _: None)
    found = {(s.domain, s.name): list(s.documents()) for s in open_sources([str(tmp_path / "raw")])}
    assert found == {
        ("ko", "HAERAE-HUB/KOREAN-SyntheticText-1.5B"): ["한국어"],
        ("en", "HuggingFaceFW/fineweb-edu"): ["web"],
        ("math", "HuggingFaceTB/finemath"): ["1 + 1"],
    }
    with pytest.raises(ValueError, match="'nothing'"):
        public_mix(("nothing",))
    with pytest.raises(FileNotFoundError, match="not in the mirror"):
        download(tmp_path / "raw", 1e6, places(mirror), public_mix(("cosmopedia-ko",)))


def test_the_table_is_the_plan() -> None:
    shares: dict[str, float] = {}
    for source in HUB_SOURCES.values():
        shares[source.domain] = shares.get(source.domain, 0) + source.share
    assert shares == {"ko": 40, "en": 20, "code": 25, "math": 15}
    assert all(s.fallback in FALLBACKS for s in HUB_SOURCES.values() if s.fallback)
