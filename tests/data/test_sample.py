"""The tokenizer's text: every source at its share, from all over its files; a source that gives none is refused."""

import json
from pathlib import Path

import pytest
from texts import random_texts, write_jsonl

from yaongi.data.mix import PLAN
from yaongi.data.sources.hub import HUB_SOURCES
from yaongi.data.sources.sample import Sample
from yaongi.data.sources.specs import open_sources
from yaongi.data.stages.train_tokenizer import train_on_sources


def hub_folder(folder: Path) -> Path:
    """Write a download of the whole public mix, each source larger than the sample."""
    for number, (name, source) in enumerate(HUB_SOURCES.items()):
        inner = folder / "train" / source.domain / name
        write_jsonl(inner / "part-00000.jsonl", random_texts(number, 300))
        (inner / "source.json").write_text(json.dumps({"id": source.id, "licence": "x"}))
    return folder


def given(sample: Sample) -> dict[str, int]:
    """Return the bytes that each source gave."""
    list(sample)
    return {source.name: size for (source, _), size in zip(sample._shares, sample.given, strict=True)}


def test_every_source_of_the_plan_gives_its_share(tmp_path: Path) -> None:
    sample = Sample(open_sources([str(hub_folder(tmp_path / "raw"))]), PLAN, 200_000)
    sizes = given(sample)
    for source in HUB_SOURCES.values():
        assert abs(sizes[source.id] - source.share / 100 * 200_000) < 1000, source.id
    assert sample.lines().count("\n") == 8
    assert "  ko/lcw99/wikipedia-korean-20240501: 0.01 MB" in sample.lines()


def test_other_sources_go_by_size_and_each_gives_something(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "large.jsonl", random_texts(1, 900))
    write_jsonl(tmp_path / "small.jsonl", random_texts(2, 300))
    write_jsonl(tmp_path / "tiny.jsonl", ["x"])
    sources = open_sources([f"law={tmp_path / f'{name}.jsonl'}" for name in ("large", "small", "tiny")])
    sizes = given(Sample(sources, {"law": 1}, 80_000))
    assert sizes["large"] == pytest.approx(60_000, abs=1000)
    assert sizes["small"] == pytest.approx(20_000, abs=1000)
    assert sizes["tiny"] > 0


def test_text_comes_from_all_files_of_a_source(tmp_path: Path) -> None:
    for number in range(150):
        write_jsonl(tmp_path / "law" / f"{number:03d}.jsonl", [f"{number} {n}" for n in range(40)])
    documents = list(Sample(open_sources([str(tmp_path / "law")]), {"law": 1}, 1500))
    assert len({document.split()[0] for document in documents}) == 50
    assert len(list(Sample(open_sources([str(tmp_path / "law")]), {"law": 1}, 10**9))) == 2 * 150 * 40


def test_what_runs_out_starts_again_until_all_is_read_twice(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "ko.jsonl", ["가" * 10] * 5)
    write_jsonl(tmp_path / "en.jsonl", ["a" * 7] * 1000)
    sources = open_sources([f"{name}={tmp_path / f'{name}.jsonl'}" for name in ("ko", "en")])
    sizes = given(Sample(sources, {"ko": 3, "en": 1}, 4000))
    assert sizes["ko"] == pytest.approx(3000, abs=60)
    assert sum(given(Sample(sources, {"ko": 3, "en": 1}, 10**9)).values()) == pytest.approx(56_000, abs=60)


def test_a_source_that_gives_no_text_is_refused(tmp_path: Path) -> None:
    raw = hub_folder(tmp_path / "raw")
    write_jsonl(raw / "train" / "ko" / "fineweb2-ko" / "part-00000.jsonl", ["", " "])
    with pytest.raises(ValueError, match=r"source KORMo-Team/FineWeb2-ko-synth of ko must have text, got none"):
        train_on_sources([str(raw)], tmp_path / "out", 700, "", 100_000, say=lambda _: None)
    with pytest.raises(ValueError, match="mix: domains must be among ko, en, code, math, which have text, got law"):
        train_on_sources([str(raw)], tmp_path / "out", 700, "law=1", 100_000, say=lambda _: None)
