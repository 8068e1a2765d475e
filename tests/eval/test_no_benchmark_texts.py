"""No line of a benchmark is in the repository: 13 words in a row are looked for.

`YAONGI_BENCHMARKS=FOLDER pytest tests/eval/test_no_benchmark_texts.py` looks for those of a folder, which
`yaongi data benchmarks` fetches; CI has none, and checks that the search finds what was planted.
"""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from yaongi.data.filters.decontaminate import Benchmarks, benchmark_items
from yaongi.data.text import normalize, word_hashes

ROOT = Path(__file__).resolve().parents[2]
GIVEN = os.environ.get("YAONGI_BENCHMARKS", "")
QUESTION = "A made-up question of this test asks how many of the seven sleepy cats on the old green sofa are awake"


def quoting(files: Iterable[Path], items: Iterable[str]) -> list[str]:
    """Return the files that share an n-gram with an item."""
    benchmarks = Benchmarks(items)
    assert benchmarks, "there must be items long enough to be found"
    return [str(file) for file in files if benchmarks.touches(word_hashes(normalize(text_of(file))))]


def text_of(file: Path) -> str:
    return file.read_bytes().decode(errors="ignore")


def tracked() -> list[Path]:
    """Every file of the repository, but for pictures."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    files = [ROOT / name for name in listed if name and not name.endswith((".png", ".svg"))]
    return [file for file in files if file.is_file()]


def test_the_search_finds_what_is_planted(tmp_path: Path) -> None:
    """In one file of several, in another case and over a line break."""
    clean, planted = tmp_path / "clean.txt", tmp_path / "planted.py"
    clean.write_text("Nothing to be found here, however long one looks at each and every word of it.")
    planted.write_text(f'PROMPT = """{QUESTION.upper().replace(" SEVEN ", chr(10) + "seven ")}"""\n')
    assert quoting([clean, planted], [QUESTION]) == [str(planted)]


def test_it_would_find_a_quotation_in_the_repository() -> None:
    """This file quotes the question above, and no other one does."""
    assert quoting({*tracked(), Path(__file__).resolve()}, [QUESTION]) == [str(Path(__file__).resolve())]


@pytest.mark.skipif(not GIVEN, reason="no local copy of benchmarks: YAONGI_BENCHMARKS=FOLDER names one")
def test_no_benchmark_is_quoted() -> None:
    assert quoting(tracked(), benchmark_items([GIVEN])) == []
