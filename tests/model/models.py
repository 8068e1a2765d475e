"""Small models that the tests share: every part of the real one, in milliseconds."""

from typing import Any

import torch

from yaongi.model import EngramConfig, ModelConfig, Yaongi

VOCABULARY = 61
COMPRESSION = [token // 2 for token in range(VOCABULARY)]
SIZES: dict[str, Any] = {
    "pattern": "MEM*E",
    "hidden_size": 32,
    "vocab_size": VOCABULARY,
    "mamba_heads": 4,
    "mamba_head_dim": 8,
    "mamba_groups": 2,
    "mamba_state": 8,
    "attention_heads": 4,
    "attention_kv_heads": 2,
    "attention_head_dim": 8,
    "experts": 6,
    "experts_per_token": 2,
    "expert_size": 16,
    "shared_expert_size": 24,
    "max_sequence_length": 64,
}
ENGRAMS = (
    EngramConfig(layer=1, heads=2, head_dim=4, rows=50),
    EngramConfig(layer=3, heads=2, head_dim=4, rows=70, orders=(2, 3, 4), gate="demo"),
)


def config(*, engram: bool = False, **changes: Any) -> ModelConfig:
    """The small config with fields changed; with two Engrams on request."""
    return ModelConfig(**(SIZES | ({"engram": ENGRAMS} if engram else {}) | changes))


def small_model(*, engram: bool = False, dtype: torch.dtype = torch.float32, seed: int = 1, **changes: Any) -> Yaongi:
    """A model in which no part is zero: correction biases and Engram's convolutions are drawn too."""
    wanted = config(engram=engram, **changes)
    model = Yaongi(wanted, seed=seed, dtype=dtype, compression=COMPRESSION if wanted.engram else None)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.2, 0.2, generator=random)
            elif name.endswith("engram.conv.weight"):
                tensor.normal_(0, 0.5, generator=random)
    return model


def tokens(batch: int = 2, length: int = 37, seed: int = 0) -> torch.Tensor:
    """Random token ids (B, L), int64."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def documents(*rows: list[int]) -> torch.Tensor:
    """Document ids (B, L), int32, of rows of document lengths."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]).int()


def wave(shape: torch.Size) -> torch.Tensor:
    """cos(0), cos(1), …: a gradient that weighs every output differently."""
    return torch.arange(shape.numel(), dtype=torch.float64).cos().view(shape)
