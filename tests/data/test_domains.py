"""Any domains with any names, in one mix; sources at the plan's shares; other encodings, other fields, little text."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from test_commands import run
from texts import random_texts, write_jsonl

from yaongi.data.loader import Loader
from yaongi.data.mix import choose_mix, mix_text, parse_mix
from yaongi.data.sources.hub import HUB_SOURCES
from yaongi.data.sources.readers import Reading
from yaongi.data.sources.specs import open_sources
from yaongi.data.stages.tokenize_sources import Options, tokenize_sources
from yaongi.data.tokenizer import Tokenizer, train_tokenizer


def build(specs: list[str], tokenizer: Tokenizer, out: Path, **reading: object) -> Path:
    options = Options(reading=Reading(**reading))  # type: ignore[arg-type]
    tokenize_sources(specs, tokenizer, out, options, workers=1, say=lambda _: None)
    return out


def loader(folder: Path, mix: str = "") -> Loader:
    return Loader(folder, row_tokens=64, batch_rows=8, mix=mix)


def test_a_download_in_decomposed_letters_describes_itself(tmp_path: Path) -> None:
    """As macOS writes names: the domain is in NFC, its folder on the disk is not."""
    folder = tmp_path / "raw" / "train" / unicodedata.normalize("NFD", "한국어") / "wiki"
    write_jsonl(folder / "part-0.jsonl", ["글"])
    (folder / "source.json").write_text(json.dumps({"id": "me/wiki", "licence": "CC0"}))
    (source,) = open_sources([str(tmp_path / "raw")], Reading(text_field="body"))
    assert (source.domain, source.name, source.licence) == ("한국어", "me/wiki", "CC0")
    assert list(source.documents()) == ["글"]


def test_held_out_text_alone_is_no_source(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c" / "val" / "ko.jsonl", ["글"])
    with pytest.raises(ValueError, match="c must hold train/ beside val/, got none"):
        open_sources([str(tmp_path / "c")])


def test_domains_may_have_any_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    specs = [f"한국어={write_jsonl(tmp_path / 'a.jsonl', random_texts(1, 90))}"]
    specs += [f"a law={write_jsonl(tmp_path / 'b.jsonl', random_texts(2, 30))}"]
    tokens = build(specs, tokenizer, tmp_path / "t")
    found = loader(tokens)
    assert found.domains == ("a law", "한국어")
    sizes = found.shard_set.tokens("train")
    percent = {domain: round(100 * size / sum(sizes.values()), 2) for domain, size in sizes.items()}
    assert found.mix == percent, "by size: every text is read equally often"
    assert loader(tokens, "한국어=3,a law=1").mixture.shares == {"a law": 1, "한국어": 3}
    assert set(np.unique(loader(tokens, "한국어=1").batch(0).domains)) == {0}
    with pytest.raises(ValueError, match="domains must be among a law, 한국어, which have text, got ko, en"):
        loader(tokens, "ko=1,en=1")


def test_one_language_is_a_mix(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = build([f"ko={write_jsonl(tmp_path / 'a.jsonl', random_texts(1, 90))}"], tokenizer, tmp_path / "t")
    assert mix_text(loader(tokens).mix) == "ko=40"


def test_the_mix_is_what_is_asked_or_there() -> None:
    assert choose_mix("", {"ko": 5, "math": 9, "en": 0}) == {"ko": 40, "math": 15}
    assert choose_mix("", {"law": 5, "ko": 9}) == {"ko": 64.29, "law": 35.71}
    assert choose_mix("", {"law": 1, "tax": 10**9}) == {"law": 0.01, "tax": 100}
    assert choose_mix(" law = 2, ko=0.5", {"law": 5, "ko": 9}) == {"ko": 0.5, "law": 2}
    assert parse_mix(mix_text({"b": 1 / 3, "ko": 94098612, "a": 2})) == {"ko": 94098612, "a": 2, "b": 1 / 3}
    with pytest.raises(ValueError, match="mix: a domain must have text, got none"):
        choose_mix("", {"ko": 0})
    with pytest.raises(ValueError, match="must be among ko, which have text, got law"):
        choose_mix("law=1,ko=1", {"law": 0, "ko": 9})


def test_a_plain_folder_is_a_domain_of_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "판결문"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(name)
    (source,) = open_sources([str(folder)])
    assert (source.domain, list(source.documents())) == ("판결문", ["a.txt", "b.txt"])
    (source,) = open_sources([str(folder / "a.txt")])
    assert source.domain == "a"
    odd = tmp_path / "a,b"
    odd.mkdir()
    (odd / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"got 'a,b'; write --source DOMAIN=.*a,b"):
        open_sources([str(odd)])
    for name in ("", ".x", "a/b", "a\nb", "x" * 200):
        with pytest.raises(ValueError, match="mix: the name of a domain must be"):
            open_sources([f"{name}={folder}"])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_another_encoding(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes((json.dumps({"text": "한글"}, ensure_ascii=False)).encode("cp949"))
    with pytest.raises(ValueError, match=f"{name} cannot be read as utf-8; try --encoding cp949") as caught:
        list(open_sources([f"ko={tmp_path}"])[0].documents())
    assert "\n" not in str(caught.value)
    (source,) = open_sources([f"ko={tmp_path}"], Reading(encoding="cp949"))
    assert "한글" in next(source.documents())
    with pytest.raises(ValueError, match="encoding must be one that Python knows, got 'klingon'"):
        Reading(encoding="klingon")


def test_another_field(tmp_path: Path) -> None:
    rows = [{"text": "no", "body": "yes"}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.txt").write_text("a text")
    (source,) = open_sources([f"ko={tmp_path}"], Reading(text_field="body"))
    assert list(source.documents()) == ["yes", "yes", "a text"]


def test_a_table_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes('id\tdocument\r\n1\t한 "글"\r\n2\t\r\n3\r\n'.encode("cp949"))
    said: list[str] = []
    reading = Reading(text_field="document", encoding="cp949")
    (source,) = open_sources([f"ko={tmp_path / 'a.tsv'}"], reading, said.append)
    assert list(source.documents()) == ['한 "글"']
    assert source.tally.total("empty") == 1
    assert "a.tsv, row 2: one of ['document'] must hold text, got document null" in said[0]
    (tmp_path / "b.csv").write_text('text\n"x')
    with pytest.raises(ValueError, match=r"b.csv cannot be read: unexpected end of data"):
        list(open_sources([f"ko={tmp_path / 'b.csv'}"])[0].documents())


def test_text_in_an_object_of_the_row(tmp_path: Path) -> None:
    rows = [{"pair": {"ko": "고양이", "en": "cat"}}, {"pair": {"ko": "개", "en": None}}, {"pair": None}, {"pair": {}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), tmp_path / "b.parquet")
    for name, counted in (("a.jsonl", 2), ("b.parquet", 0)):
        (source,) = open_sources([f"ko={tmp_path / name}"], Reading(text_field="pair.ko", bad_rows=1.0), lambda _: None)
        assert list(source.documents()) == ["고양이", "개"]
        assert source.tally.total("bad") == counted


def test_options_that_change_the_text_make_shards_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": text, "body": other} for text, other in zip(random_texts(1, 9), random_texts(2, 9), strict=True)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = (build([f"ko={path}"], tokenizer, tmp_path / "t") / "manifest.json").read_bytes()
    assert (build([f"ko={path}"], tokenizer, tmp_path / "t", text_field="body") / "manifest.json").read_bytes() != first


def test_little_text_gives_fewer_pieces() -> None:
    said: list[str] = []
    few = train_tokenizer(random_texts(1, 300), 32768, said.append)
    assert few.vocab_size % 64 == 0
    (line,) = said
    assert line.startswith(f"tokenizer: {few.vocab_size:,} pieces, not 32,768: the text is too little for more than ")
    assert train_tokenizer(iter(["가나다"]), 4096, said.append).vocab_size < 400
    many = ["".join(map(chr, range(0xAC00, 0xAC00 + 900)))]
    with pytest.raises(ValueError, match=r"tokenizer: vocab_size must be at least 12\d\d for this text, got 600"):
        train_tokenizer(many, 600)


def test_sources_of_the_plan_have_its_shares(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whatever their sizes; other sources of a domain go by size, as one stream."""
    names = ("korean-synthetic", "cosmopedia-ko", "wikipedia-ko", "fineweb2-ko")
    for number, name in enumerate(names):
        folder = tmp_path / "raw" / "train" / "ko" / name
        write_jsonl(folder / "part-0.jsonl", random_texts(number, 20 + 60 * number))
        (folder / "source.json").write_text(json.dumps({"id": HUB_SOURCES[name].id, "licence": "x"}))
    write_jsonl(tmp_path / "raw" / "train" / "en.jsonl", random_texts(9, 20))
    found = loader(build([str(tmp_path / "raw")], tokenizer, tmp_path / "t"))
    shares = {f"ko/{HUB_SOURCES[name].id}": HUB_SOURCES[name].share for name in names} | {"en": 20}
    counts = found.mixture.counts(60)
    assert {name: counts[name] for name in shares} == shares
    assert found.domains == ("ko", "en")
    batch = found.read(range(60))
    assert np.bincount(batch.domains).tolist() == [40, 20]
    specs = [str(tmp_path / "raw"), f"ko={write_jsonl(tmp_path / 'mine.jsonl', random_texts(99, 30))}"]
    assert loader(build(specs, tokenizer, tmp_path / "u")).mixture.shares == {"ko": 2, "en": 1}


def test_the_commands_take_several_sources(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each of a repeated option, and each of several words behind one."""
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", random_texts(n, 90)) for n, name in enumerate("abc")]
    sources = ["--source", f"x={paths[0]}", f"y={paths[1]}", "--source", f"z={paths[2]}"]
    out, tokens = str(tmp_path / "tokenizer"), str(tmp_path / "t")
    run(monkeypatch, "tokenizer", *sources, "--out", out, "--vocab-size", "700", "--mix", "x=1,z=2")
    said = capsys.readouterr().out
    assert "mix: x=1,z=2\nnot in the mix, so not read: y\n" in said
    run(monkeypatch, "tokenize", *sources, "--tokenizer", out, "--out", tokens, "--workers", "1")
    assert set(loader(Path(tokens)).domains) == {"x", "y", "z"}
