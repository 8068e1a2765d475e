"""Texts and files for tests."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from yaongi.data.sources.readers import read_texts

# For a script: its peak memory in kilobytes. `getrusage` would include the memory that its parent had at the fork.
PEAK = """
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
"""


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """Write texts as a JSON-lines file, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def random_texts(seed: int, count: int, words: int = 40) -> list[str]:
    """Return texts of random words, no two of them near duplicates."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz가나다라마바사아자차카타파하"
    return [" ".join("".join(rng.choices(letters, k=5)) for _ in range(words)) for _ in range(count)]


def read_documents(path: Path) -> Iterator[str]:
    """Yield the texts of a file. Raises ValueError for a bad row."""
    for text in read_texts(path):
        if isinstance(text, ValueError):
            raise text
        yield text
