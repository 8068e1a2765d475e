"""One small tokenizer and one small folder of token shards for all tests here."""

from pathlib import Path

import pytest
from texts import random_texts, write_jsonl

from yaongi.data.mix import PLAN
from yaongi.data.sources.embedded.corpus import embedded_sources
from yaongi.data.sources.sample import Sample
from yaongi.data.sources.source import TRAIN
from yaongi.data.stages.tokenize_sources import Options, tokenize_sources
from yaongi.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Return a tokenizer of 4,096 pieces, trained on a part of the embedded corpus."""
    sources = [source for source in embedded_sources() if source.split == TRAIN]
    return train_tokenizer(Sample(sources, PLAN, 1_500_000), 4096)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with train/ and val/ for the four domains."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, domain in enumerate(("ko", "en", "code", "math")):
        write_jsonl(folder / "train" / f"{domain}.jsonl", random_texts(number, 60 + 20 * number))
        write_jsonl(folder / "val" / f"{domain}.jsonl", random_texts(100 + number, 12))
    return folder


@pytest.fixture(scope="session")
def shards(corpus: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the token shards of `corpus`, several per domain. Tests that change them must take a copy."""
    out = tmp_path_factory.mktemp("shards") / "tokens"
    tokenize_sources([str(corpus)], tokenizer, out, Options(shard_tokens=3000), workers=1, say=lambda _: None)
    return out
