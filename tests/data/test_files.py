"""Every file under a source is read, or named as left out with the reason; names that differ stay apart."""

import bz2
import json
import re
import subprocess
from pathlib import Path

import pytest
from texts import random_texts, write_jsonl

from yaongi.data.stages.tokenize_sources import Options, tokenize_sources
from yaongi.data.tokenizer import Tokenizer


def build(specs: list[str], tokenizer: Tokenizer, out: Path) -> tuple[dict, list[str]]:  # type: ignore[type-arg]
    """Return the manifest and the printed lines."""
    said: list[str] = []
    return tokenize_sources(specs, tokenizer, out, Options(), workers=1, say=said.append), said


def documents(manifest: dict) -> int:  # type: ignore[type-arg]
    return sum(domain["documents"] for split in manifest["splits"].values() for domain in split.values())


def test_loose_files_beside_sub_folders_are_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ko = tmp_path / "c" / "train" / "ko"
    write_jsonl(ko / "wiki" / "a.jsonl", random_texts(1, 30))
    write_jsonl(ko / "loose.jsonl", random_texts(2, 50))
    manifest, _ = build([str(tmp_path / "c")], tokenizer, tmp_path / "t")
    assert documents(manifest) == 80


@pytest.mark.parametrize("spec", ["{}", "ko={}/train/ko"])
def test_symlinked_folders_are_read_once(tokenizer: Tokenizer, tmp_path: Path, spec: str) -> None:
    ko = tmp_path / "c" / "train" / "ko"
    write_jsonl(ko / "wiki" / "a.jsonl", random_texts(1, 30))
    write_jsonl(tmp_path / "elsewhere" / "deep" / "b.jsonl", random_texts(2, 90))
    (ko / "wiki" / "more").symlink_to(tmp_path / "elsewhere")
    (ko / "loop").symlink_to(tmp_path / "c")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    (ko / "wiki" / "gone").symlink_to(tmp_path / "nothing")
    manifest, _ = build([spec.format(tmp_path / "c")], tokenizer, tmp_path / "t")
    assert documents(manifest) == 120
    assert sum(counts["exact"] for counts in manifest["counts"].values()) == 0
    reasons = {left["file"].rsplit("/", 1)[-1]: left["reason"] for left in manifest["left_out"]}
    assert reasons["loop"] == reasons["up"] == "link to a folder that is read anyway"
    assert reasons["gone"] == "broken link"


def test_all_files_of_a_domain_are_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train = tmp_path / "c" / "train"
    write_jsonl(train / "ko.jsonl", random_texts(1, 20))
    write_jsonl(train / "ko-00001.jsonl", random_texts(2, 50))
    write_jsonl(train / "ko_2-of-3.jsonl", random_texts(3, 5))
    write_jsonl(train / "korea.jsonl", random_texts(4, 10))
    manifest, _ = build([str(tmp_path / "c")], tokenizer, tmp_path / "t")
    assert manifest["counts"]["ko/ko"]["documents"] == 75
    assert manifest["counts"]["korea/korea"]["documents"] == 10


def test_ndjson_and_bz2_are_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_jsonl(folder / "a.jsonl", random_texts(1, 30))
    write_jsonl(folder / "b.ndjson", random_texts(2, 40))
    packed = write_jsonl(tmp_path / "c.jsonl", random_texts(3, 50)).read_bytes()
    (folder / "c.jsonl.bz2").write_bytes(bz2.compress(packed))
    manifest, _ = build([f"en={folder}"], tokenizer, tmp_path / "t")
    assert documents(manifest) == 120
    for damaged in (packed, bz2.compress(packed)[:100]):
        (folder / "c.jsonl.bz2").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"c.jsonl.bz2 cannot be read"):
            build([f"en={folder}"], tokenizer, tmp_path / "u")


def test_what_is_read_and_what_is_left_out_stands_in_the_manifest(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    texts = random_texts(1, 30)
    write_jsonl(folder / "a.jsonl", texts)
    write_jsonl(folder / "deep" / "b.jsonl", random_texts(2, 5))
    for name in ("README.md", "dataset_infos.json", "dataset_dict.json", "deep/state.json", "table.csv", ".c.jsonl"):
        (folder / name).write_text("{}")
    (folder / ".git").mkdir()
    manifest, said = build([f"en={folder}"], tokenizer, tmp_path / "t")
    size = sum(len(text.encode()) for text in texts)
    assert manifest["files"]["en/c"]["a.jsonl"] == {"documents": 30, "bytes": size}
    assert list(manifest["files"]["en/c"]) == ["a.jsonl", "deep/b.jsonl"]
    assert {left["file"]: left["reason"] for left in manifest["left_out"]} == {
        ".c.jsonl": "hidden",
        ".git": "hidden",
        "README.md": "metadata",
        "dataset_dict.json": "metadata",
        "dataset_infos.json": "metadata",
        "deep/state.json": "metadata",
        "table.csv": "a table: read if it is named itself",
    }
    (line,) = [line for line in said if "left out" in line]
    assert line.startswith("left out 7 files: .c.jsonl (hidden), .git (hidden), README.md (metadata)")
    assert line.endswith("and 2 more")


def test_files_beside_the_splits_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_jsonl(folder / "train" / "ko.jsonl", random_texts(1, 30))
    for name in ("ko.jsonl", "old/ko.jsonl"):
        write_jsonl(folder / name, ["x"])
    manifest, said = build([str(folder)], tokenizer, tmp_path / "t")
    assert {left["file"]: left["reason"] for left in manifest["left_out"]} == {
        "ko.jsonl": "not in train/ or val/",
        "old": "not in train/ or val/",
    }
    assert sum("left out 2 files" in line for line in said) == 1


def test_sources_of_one_name_are_counted_apart(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for number, name in enumerate(("v1.0", "v1.5", "other/v1.5")):
        write_jsonl(tmp_path / name / "a.jsonl", random_texts(number, 10 + number))
    specs = [f"ko={tmp_path / name}" for name in ("v1.0", "v1.5", "other/v1.5")]
    manifest, _ = build(specs, tokenizer, tmp_path / "t")
    assert {label: counts["documents"] for label, counts in manifest["counts"].items()} == {
        "ko/v1.0": 10,
        "ko/v1.5": 11,
        "ko/v1.5 #2": 12,
    }
    assert json.loads((tmp_path / "t" / "manifest.json").read_text())["files"].keys() == manifest["counts"].keys()


def folder_name(*sources: str) -> str:
    """Return the name that run_all_vessl.sh gives to the folders of a run on these sources."""
    script = (Path(__file__).parents[2] / "run_all_vessl.sh").read_text()
    functions = re.findall(r"^\w+\(\) \{\n.*?^\}", script, re.MULTILINE | re.DOTALL)
    (line,) = re.findall(r"^name=.*", script, re.MULTILINE)
    bash = "\n".join(["set -euo pipefail", *functions, 'sources=("$@")', line, 'printf %s "$name"'])
    done = subprocess.run(["bash", "-c", bash, "bash", *sources], capture_output=True, text=True, check=True)
    return done.stdout


def test_corpora_whose_names_differ_have_folders_of_their_own() -> None:
    corpora = [
        ("ko=한국어",),
        ("ko=조선말",),
        ("ko=a/b",),
        ("ko=a-b",),
        ("ko=a+b",),
        ("ko=a", "b"),
        ("ko=a b",),
        ("ko", "a", "b"),
        ("-x",),
        ("x",),
        ("embedded",),
        ("hub",),
        ("embedded", "hub"),
        ("embedded+hub",),
        ("ko=" + "가" * 300,),
        ("ko=" + "가" * 300 + "나",),
    ]
    names = [folder_name(*corpus) for corpus in corpora]
    assert len({name.lower() for name in names}) == len(corpora), names
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+-]{0,99}", name) for name in names), names
    assert folder_name("embedded") == "embedded"
    assert folder_name("hub") == "hub"
    assert folder_name("ko=a/b") == folder_name("ko=a/b")
