"""Token shards for all tests of training: four domains of random words and a tokenizer of 600 pieces."""

from pathlib import Path

import pytest
from small_run import documents

from yaongi.data.stages.tokenize_sources import Options, tokenize_sources
from yaongi.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of shards. Tests that change it must take a copy."""
    folder = tmp_path_factory.mktemp("data")
    for number, domain in enumerate(("ko", "en", "code", "math")):
        for split, seed, count in (("train", number, 60), ("val", 100 + number, 8)):
            (folder / split / domain).mkdir(parents=True)
            for i, text in enumerate(documents(seed, count)):
                (folder / split / domain / f"{i}.txt").write_text(text)
    tokenizer = train_tokenizer(documents(1, 200), 600)
    tokenize_sources([str(folder)], tokenizer, folder / "tokens", Options(), workers=1, say=lambda _: None)
    return folder / "tokens"
