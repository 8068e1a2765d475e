"""JSON files: readable in any language, and whole or not there."""

from pathlib import Path

import pytest

from yaongi import files
from yaongi.files import read_json, write_json


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Korean as it is; and half of a pair of surrogates, as in a file name that is no UTF-8."""
    path = tmp_path / "a.json"
    value = {"이름": "야옹이", "folder": "/data/\udcff"}
    write_json(path, value)
    assert read_json(path) == value
    assert '"이름": "야옹이"' in path.read_text(encoding="utf-8")


def test_a_file_that_can_t_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"step": 1})

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"step": 2})
    assert read_json(path) == {"step": 1}
