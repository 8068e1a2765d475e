"""A model, conversations and token shards for all tests of tuning."""

from pathlib import Path

import pytest
import torch
from small_chats import write_chats
from small_run import ALONE, config_of, write_tokens

from yaongi.data.tokenizer import Tokenizer
from yaongi.train.build import build_model, fit_to_data, open_data
from yaongi.train.checkpoint.model_folder import save_model


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of token shards."""
    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tokenizer(tokens: Path) -> Tokenizer:
    return Tokenizer.load(tokens / "tokenizer")


@pytest.fixture(scope="session")
def model(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an untrained model."""
    folder = tmp_path_factory.mktemp("base")
    config = config_of(tokens, folder / "run", "--model.max-sequence-length", "256")
    loader, tokenizer = open_data(config)
    config = fit_to_data(config, tokenizer, loader)
    built = build_model(config, tokenizer, "cpu", dtype=torch.float32)
    for layer in built.backbone.layers:
        if layer.kind == "E":
            layer.mixer.gate.e_score_correction_bias.copy_(torch.tensor([0.01, -0.02, 0.02, -0.01]))
    save_model(built, tokenizer, folder / "model", ALONE)
    return folder / "model"


@pytest.fixture(scope="session")
def chats(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of conversations."""
    return write_chats(tmp_path_factory.mktemp("chats") / "chat", tokenizer)
