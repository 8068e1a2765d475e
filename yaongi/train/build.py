"""From a configuration to what trains: the loader, the model, its optimizer."""

import dataclasses

import torch

from yaongi.data.loader import Loader
from yaongi.data.mix import parse_mix
from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi, compression_map
from yaongi.train.config import Config, Training
from yaongi.train.distributed import World
from yaongi.train.recompute import recomputed_layers


def open_data(config: Config) -> tuple[Loader, Tokenizer]:
    """The training order, and the tokenizer that lies with the shards.

    Raises:
        FileNotFoundError: no shards or no tokenizer there.
        ValueError: a changed or truncated shard, another tokenizer than the shards', a domain that is missing.
    """
    train = config.train
    tokenizer = Tokenizer.load(config.run.data / "tokenizer")
    loader = Loader(
        config.run.data,
        row_tokens=train.row_tokens,
        batch_rows=train.batch_rows,
        seed=train.seed,
        mix=parse_mix(train.mix),
        tokenizer_hash=tokenizer.hash,
    )
    return loader, tokenizer


def fit_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """``config`` with a model of the tokenizer's vocabulary and control ids."""
    model = dataclasses.replace(
        config.model,
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    return dataclasses.replace(config, model=model)


def build_model(config: Config, tokenizer: Tokenizer, device: torch.device | str, *, dtype: torch.dtype) -> Yaongi:
    """The model with its initial weights; on the meta device without any."""
    compression = compression_map(tokenizer.pieces()) if config.model.engram else None
    model = Yaongi(config.model, seed=config.train.seed, device=device, dtype=dtype, compression=compression)
    model.recompute = recomputed_layers(config.run.recompute, config.model.pattern)
    return model


def weight_dtype(train: Training, device: torch.device) -> torch.dtype:
    """Of the weights: as configured, or bfloat16 on a GPU and float32 on a CPU."""
    if train.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, train.dtype)


def momentum_dtype(train: Training, device: torch.device) -> torch.dtype:
    """Of the matrices' momentum: as configured, or that of the weights."""
    if train.momentum_dtype == "auto":
        return weight_dtype(train, device)
    return getattr(torch, train.momentum_dtype)


def micro_rows(config: Config, world: World, fits: int) -> int:
    """Rows of a forward pass: as configured, or the most that divide a process's share and are at most ``fits``.

    Raises:
        ValueError: the global batch can't be divided so.
    """
    rows, size = config.train.batch_rows, world.size
    if rows % size:
        raise ValueError(f"train: wanted a batch of a multiple of {size} processes' rows, got {rows} rows")
    share = rows // size
    wanted = config.run.micro_rows
    if wanted and share % wanted:
        raise ValueError(f"train: wanted micro_rows that divide the {share} rows of a process, got {wanted}")
    return wanted or max(n for n in range(1, share + 1) if share % n == 0 and n <= max(1, fits))
