"""A .json file that is one array gives a row per item, however it is laid out; a broken one is refused by name."""

import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import read_documents

from yaongi.data.sources import json_array
from yaongi.data.sources.readers import read_rows
from yaongi.data.sources.specs import open_sources

ROWS = [{"text": text, "n": [1, {"a": "]"}]} for text in ('첫 글 "]"', "둘\n[", "셋,")]


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_an_array_in_any_layout(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text("\ufeff \n" * (indent is None) + json.dumps(ROWS, indent=indent) + "\n")
    assert list(read_documents(path)) == [row["text"] for row in ROWS]
    packed = tmp_path / "b.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    (source,) = open_sources([f"ko={tmp_path}"])
    assert list(source.documents()) == [row["text"] for row in ROWS] * 2
    with path.open("rb") as file:
        assert [row["text"] for row in read_rows(file, "a.json", ["text"], 2)] == ["셋,"]


def test_rows_on_lines_stay_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(read_documents(tmp_path / "a.json")) == [row["text"] for row in ROWS]
    (tmp_path / "b.json").write_text("[]")
    assert list(read_documents(tmp_path / "b.json")) == []


@pytest.mark.parametrize("cut", [1, 5, 30, -2, -1])
def test_an_array_that_ends_early_is_refused(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS)[:cut])
    with pytest.raises(ValueError, match=r"a.json cannot be read: its array ends early") as caught:
        list(read_documents(tmp_path / "a.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['[{"text": "a"} {"text": "b"}]', '[{"text": "a"}] {', '[{"text": a}]', "[,]"])
def test_what_is_no_array_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json cannot be read: "):
        list(read_documents(tmp_path / "a.json"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@settings(max_examples=100, deadline=None)
@given(items=st.lists(VALUES, max_size=6), indent=st.sampled_from([None, 1]), chunk=st.integers(1, 9))
def test_items_are_those_of_the_json_module(items: list[object], indent: int | None, chunk: int) -> None:
    """Whatever the sizes in which the file is read."""
    text = json.dumps(items, indent=indent)
    before, json_array._CHUNK = json_array._CHUNK, chunk
    try:
        assert list(json_array.array_items(io.StringIO(text[1:]), text[:1], 1000)) == items
    finally:
        json_array._CHUNK = before
