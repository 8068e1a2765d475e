"""A model with its tokenizer, from a folder as commands take it: of a model, a run, or a checkpoint."""

import sys
from pathlib import Path

import torch

from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi
from yaongi.model.hub.checkpoint_folders import find_weights, said_weights, tokenizer_folder
from yaongi.model.hub.folder import read_config


def load_pretrained(given: Path, device: torch.device, what: str) -> tuple[Yaongi, Tokenizer]:
    """Return model and tokenizer, in float32 on a CPU and bfloat16 on a GPU; say which checkpoint stands for a run.

    Args:
        what: the command, first word of the error.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be, or the tokenizer is another model's.
    """
    folder = find_weights(given)
    read_config(folder)
    tokenizer = Tokenizer.of_model(tokenizer_folder(folder))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = Yaongi.from_pretrained(folder, dtype=dtype, device=device)
    print(said_weights(given, folder), end="", file=sys.stderr)
    if tokenizer.vocab_size != model.config.vocab_size:
        wanted = model.config.vocab_size
        raise ValueError(f"{what}: tokenizer must have {wanted} pieces, got {tokenizer.vocab_size}")
    return model, tokenizer
