"""Token shards for all tests of training: four domains of random words and a tokenizer of 600 pieces."""

from pathlib import Path

import pytest
from small_run import write_tokens


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of shards. Tests that change it must take a copy."""
    return write_tokens(tmp_path_factory.mktemp("data"))
