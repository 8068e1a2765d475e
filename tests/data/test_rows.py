"""What is dropped is counted by reason; a bad row is skipped and named, up to a limit; what isn't text is an error."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from test_commands import run
from test_download import SOURCE, documents, places
from texts import random_texts, write_jsonl

from yaongi.data.sources.readers import Reading
from yaongi.data.sources.specs import open_sources
from yaongi.data.stages.download import download_source
from yaongi.data.stages.tokenize_sources import Options, tokenize_sources
from yaongi.data.tokenizer import Tokenizer

BAD = {
    "null": ('{"text": null}', "text null"),
    "number": ('{"text": 5}', "text int"),
    "no JSON": ('{"text": "x', "not JSON"),
    "deep JSON": ("[" * 100_000, "not JSON"),
    "no object": ("[1]", "must be a JSON object, got list"),
    "list": ('{"text": ["a", "b"]}', "must be an object, got str"),
    "surrogate": ('{"text": "broken \\ud800"}', r"lone surrogates, got U\+D800 at character 7"),
    "picture": ('{"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}]}', "got 'image'"),
    "silence": ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}', "parts, got null"),
    "part": (
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}',
        "must be text, got NoneType",
    ),
}


def write_rows(path: Path, rows: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row + "\n" for row in rows))
    return path


def good(count: int, seed: int = 1) -> list[str]:
    return [json.dumps({"text": text}) for text in random_texts(seed, count, words=8)]


def build(spec: str, tokenizer: Tokenizer, out: Path, **reading: Any) -> tuple[dict, list[str]]:  # type: ignore[type-arg]
    """Return the manifest and the printed lines."""
    said: list[str] = []
    return tokenize_sources(
        [spec], tokenizer, out, Options(reading=Reading(**reading)), workers=1, say=said.append
    ), said


def texts_of(path: Path) -> list[str]:
    return [text for source in open_sources([f"ko={path}"]) for text in source.documents()]


def test_content_counts_where_text_is_empty(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "", "content": "a"}, {"text": " \n", "content": "b"}, {"text": "c"}]
    write_rows(tmp_path / "c" / "a.jsonl", [json.dumps(row) for row in rows])
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c" / "b.parquet")
    assert texts_of(tmp_path / "c") == ["a", "b", "c"] * 2


def test_parts_of_a_message_are_its_text(tmp_path: Path) -> None:
    content = [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "2"}]
    path = write_rows(tmp_path / "a.jsonl", [json.dumps({"messages": messages})])
    assert texts_of(path) == ["<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"]


def test_empty_messages_stay_and_empty_conversations_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def row(*contents: str) -> str:
        roles = ("system", "user", "assistant")
        return json.dumps({"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]})

    path = write_rows(tmp_path / "a.jsonl", [row("", "1 + 1?", "2"), row("", " ", "")])
    (text,) = texts_of(path)
    assert text == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    )
    assert build(f"ko={path}", tokenizer, tmp_path / "t")[0]["counts"]["ko/a"]["empty"] == 1


def test_a_text_file_loses_its_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff한 글\r\n\ufeff끝\rx\r\n".encode())
    assert texts_of(path) == ["한 글\n\ufeff끝\rx\n"]
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\n"}\r\n')
    assert texts_of(tmp_path / "b.jsonl") == ["a\r\n"]


def test_what_is_dropped_is_counted_and_printed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [*good(30), '{"text": ""}', '{"text": " \\n"}', '{"text": null}']
    path = write_rows(tmp_path / "c" / "a.jsonl", [*rows, rows[0]])
    manifest, said = build(f"en={path.parent}", tokenizer, tmp_path / "t")
    counts = manifest["counts"]["en/c"]
    assert (counts["documents"], counts["exact"], counts["empty"], counts["bad"]) == (30, 1, 2, 1)
    assert manifest["files"]["en/c"]["a.jsonl"] | {"bytes": 0} == {"documents": 31, "bytes": 0, "empty": 2, "bad": 1}
    assert any("2 empty" in line and "1 bad" in line for line in said)


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 1) for kind in BAD), ("surrogate", 2)])
def test_one_bad_row_is_skipped_and_named(tokenizer: Tokenizer, tmp_path: Path, kind: str, workers: int) -> None:
    bad, message = BAD[kind]
    path = write_rows(tmp_path / "a.jsonl", [*good(3), bad, *good(30, seed=2)])
    said: list[str] = []
    manifest = tokenize_sources([f"en={path}"], tokenizer, tmp_path / "t", Options(), workers=workers, say=said.append)
    assert manifest["counts"]["en/a"]["documents"] == 33
    (line,) = [line for line in said if "skipped" in line]
    assert "a.jsonl, row 3: " in line
    with pytest.raises(ValueError, match=rf"at most 1 among 7 .*a.jsonl, row 6: .*{message}") as caught:
        build(f"en={write_rows(path, [*good(3), bad, *good(2, seed=2), bad])}", tokenizer, tmp_path / "u")
    assert "--bad-rows" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_limit_is_a_share_of_all_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ['{"text": null}'] * 2 + good(38))
    with pytest.raises(ValueError, match=r"at most 1 among 40 .*got 2"):
        build(f"en={path}", tokenizer, tmp_path / "t")
    with pytest.raises(ValueError, match=r"at most 1 among 40 .*got 2"):
        build(f"en={path}", tokenizer, tmp_path / "t", bad_rows=0.04)
    assert build(f"en={path}", tokenizer, tmp_path / "t", bad_rows=0.05)[0]["counts"]["en/a"]["bad"] == 2


def test_a_source_that_is_all_bad_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ['{"text": null}'] * 1000)
    with pytest.raises(ValueError, match=r"a.jsonl, row 100: "):
        texts_of(path)


def test_the_commands_take_the_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [*good(400), '{"text": null}', '{"text": 5}']
    source = f"en={write_rows(tmp_path / 'a.jsonl', rows)}"
    out = str(tmp_path / "tokenizer")
    train = ["tokenizer", "--source", source, "--out", out, "--vocab-size", "700", "--mix", "en=1", "--megabytes", "1"]
    write = ["tokenize", "--source", source, "--tokenizer", out, "--out", str(tmp_path / "t"), "--workers", "1"]
    for command in (train, write):
        with pytest.raises(SystemExit):
            run(monkeypatch, *command)
        error = capsys.readouterr().err
        assert error.startswith(("error: data: bad rows must be ", "error: en/a: data: bad rows must be "))
        assert error.endswith("a.jsonl, row 401: one of ['text', 'content', 'messages'] must hold text, got text int\n")
        run(monkeypatch, *command, "--bad-rows", "0.01")
        assert "a.jsonl, row 400: " in capsys.readouterr().out
    mirror = tmp_path / "mirror"
    write_rows(mirror / "HuggingFaceTB" / "finemath" / "finemath-4plus" / "a.jsonl", rows)
    fetch = ["download", "--mirror", str(mirror), "--out", str(tmp_path / "raw"), "--only", "finemath"]
    with pytest.raises(SystemExit):
        run(monkeypatch, *fetch)
    assert "a.jsonl, row 401: " in capsys.readouterr().err
    run(monkeypatch, *fetch, "--bad-rows", "0.01")
    assert "400 documents, 2 bad, " in capsys.readouterr().out


def test_a_download_skips_a_bad_row_and_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "mirror" / "owner" / "set" / "data"
    texts = random_texts(1, 30)
    rows = [{"text": text} for text in texts]
    folder.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist([*rows[:9], {"text": None}, *rows[9:]]), folder / "a.parquet")
    (folder / "dataset_infos.json").write_text('{"default": {\n"features": {}}}')
    said: list[str] = []
    progress = download_source(SOURCE, tmp_path / "out", 10**9, places(tmp_path / "mirror"), said.append)
    assert documents(tmp_path / "out") == texts
    assert progress.skipped == {"bad": 1}
    assert any("a.parquet, row 9: " in line for line in said)
    write_jsonl(folder / "b.jsonl", ["x \ud800"])
    with pytest.raises(ValueError, match=r"at most 1 among 32 .*got 2"):
        download_source(SOURCE, tmp_path / "other", 10**9, places(tmp_path / "mirror"), said.append)
