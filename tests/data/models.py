"""Folders of small models, for tests of commands that read data."""

from pathlib import Path

from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi

ROW = 64  # tokens that a model takes
SIZES = {
    "hidden_size": 24,
    "mamba_heads": 4,
    "mamba_head_dim": 6,
    "mamba_groups": 2,
    "mamba_state": 5,
    "attention_heads": 2,
    "attention_kv_heads": 1,
    "attention_head_dim": 8,
    "experts": 4,
    "experts_per_token": 2,
    "expert_size": 8,
    "shared_expert_size": 8,
    "max_sequence_length": ROW,
}


def save_model(model: Yaongi, tokenizer: Tokenizer, folder: Path) -> Path:
    """Write a model and its tokenizer into a folder, and return it."""
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder
