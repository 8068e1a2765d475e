"""From a configuration to the loader and the model."""

import dataclasses
import shlex

import torch
from numpy.typing import ArrayLike

from yaongi.data.epochs import tokens_for
from yaongi.data.loader import Loader
from yaongi.data.mix import mix_text
from yaongi.data.row_loader import RowLoader
from yaongi.data.shards import MANIFEST
from yaongi.data.tokenizer import MODEL_FILE, Tokenizer
from yaongi.model import Yaongi, compression_map
from yaongi.model.check import compression_table
from yaongi.model.initialize import PartOf, initialize, set_constants
from yaongi.train.config import Config, Training
from yaongi.train.recompute import recomputed_layers


def weight_dtype(train: Training, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights: as configured; for "auto" bfloat16 on a GPU and float32 on a CPU."""
    if train.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, train.dtype)


def matrix_momentum_dtype(train: Training, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrices' momentum buffers: as configured; for "auto" that of the weights."""
    return weight_dtype(train, device) if train.momentum_dtype == "auto" else getattr(torch, train.momentum_dtype)


def open_data(config: Config) -> tuple[Loader, Tokenizer]:
    """Open the token shards, and the tokenizer stored with them.

    Raises:
        FileNotFoundError: there are no shards or no tokenizer; the message names the command that makes them.
        ValueError: a shard was changed or truncated, the shards were made with another tokenizer, or a domain is
            missing.
    """
    train, data = config.train, config.run.data
    if not (data / MANIFEST).is_file() or not (data / "tokenizer" / MODEL_FILE).is_file():
        made = f"python -m yaongi.data tokenize --out {shlex.quote(str(data))} makes one"
        raise FileNotFoundError(
            f"train: --data must be a folder of token shards with their tokenizer, got {data}; {made}"
        )
    tokenizer = Tokenizer.load(config.run.data / "tokenizer")
    loader = Loader(
        config.run.data,
        row_tokens=train.row_tokens,
        batch_rows=train.batch_rows,
        seed=train.seed,
        mix=train.mix,
        tokenizer_hash=tokenizer.hash,
    )
    return loader, tokenizer


def fit_to_data(config: Config, tokenizer: Tokenizer, loader: RowLoader) -> Config:
    """Return `config` with the loader's mix, the tokens of at most `max_epochs`, and the tokenizer's size and ids."""
    model = dataclasses.replace(
        config.model,
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    train = dataclasses.replace(config.train, mix=mix_text(loader.mix))
    if config.run.max_epochs:
        most = tokens_for(loader.tokens, loader.mixture.shares, config.run.max_epochs)
        whole = max(1, most // train.batch_tokens) * train.batch_tokens
        train = dataclasses.replace(train, tokens=min(train.tokens, float(whole)))
    return dataclasses.replace(config, model=model, train=train)


def build_model(
    config: Config, tokenizer: Tokenizer | None, device: torch.device | str, *, dtype: torch.dtype
) -> Yaongi:
    """Build the model with its initial weights; on the meta device it has none.

    Args:
        tokenizer: may be absent on the meta device alone: it decides which ids Engram takes for the same.
    """
    compression = _compression(config, tokenizer)
    model = Yaongi(config.model, seed=config.train.seed, device=device, dtype=dtype, compression=compression)
    model.recompute = recomputed_layers(config.run.recompute, config.model.pattern)
    return model


@torch.no_grad()
def materialize(model: Yaongi, config: Config, tokenizer: Tokenizer, device: torch.device, part_of: PartOf) -> None:
    """Move a model from the meta device, if it is there: what is here of it gets what `build_model` gives all of it.

    Args:
        part_of: which rows of a parameter are here.
    """
    if not model.lm_head.weight.is_meta:
        return
    model.to_empty(device=device)
    set_constants(model)
    compression = _compression(config, tokenizer)
    if model.backbone.compression is not None and compression is not None:
        model.backbone.compression.copy_(compression_table(compression, config.model))
    initialize(model, model.config, config.train.seed, part_of)


def _compression(config: Config, tokenizer: Tokenizer | None) -> ArrayLike | None:
    """Return which token ids Engram takes for the same; None: it takes none."""
    variant = config.train.engram_compression
    if tokenizer is None or not config.model.engram or variant == "none":
        return None
    return compression_map(tokenizer.pieces(), variant)
