"""From a configuration to the loader and the model."""

import dataclasses
import shlex

import torch

from yaongi.data.epochs import tokens_for
from yaongi.data.loader import Loader
from yaongi.data.mix import mix_text
from yaongi.data.row_loader import RowLoader
from yaongi.data.shards import MANIFEST
from yaongi.data.tokenizer import MODEL_FILE, Tokenizer
from yaongi.model import Yaongi, compression_map
from yaongi.train.config import Config
from yaongi.train.recompute import recomputed_layers


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
    variant, compression = config.train.engram_compression, None
    if tokenizer is not None and config.model.engram and variant != "none":
        compression = compression_map(tokenizer.pieces(), variant)
    model = Yaongi(config.model, seed=config.train.seed, device=device, dtype=dtype, compression=compression)
    model.recompute = recomputed_layers(config.run.recompute, config.model.pattern)
    return model
