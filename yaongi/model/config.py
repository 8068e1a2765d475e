"""What a model is: `ModelConfig`, its validation, and the presets.

Letters of the documentation: d = hidden_size, V = vocab_size; H × P, G, N = heads × their width, groups and state of
Mamba-2; E, K, F, S = experts, how many a token takes, their width and the shared expert's width.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from yaongi.presets import read_preset
from yaongi.settings import FieldChecks, from_table, to_table

AttentionBackend = Literal["auto", "sdpa", "varlen", "flex", "flash"]
Gate = Literal["paper", "demo"]
LAYER_LETTERS = "ME*"  # Mamba-2, experts, attention


@dataclass(frozen=True)
class EngramConfig:
    """One Engram, added before the mixer of one layer."""

    layer: int  # index in the pattern
    heads: int  # hash heads of each order
    head_dim: int  # width of a table row
    rows: int  # rows of a head are the next unused prime from here
    orders: tuple[int, ...] = (2, 3)  # lengths of the n-grams
    gate: Gate = "paper"  # "paper": sigmoid(s); "demo": sigmoid(sign(s)·sqrt(|s|))
    kernel: int = 4  # taps of the convolution, its dilation is the longest order
    seed: int = 0  # of the hash multipliers
    sparse_gradients: bool = True  # the table's gradient holds only the rows that were read

    def __post_init__(self) -> None:
        check = FieldChecks("engram")
        check.types(self)
        check.positive(self, "heads", "head_dim", "rows", "kernel")
        check.require(self.layer >= 0, "layer", "0 or more", self.layer)
        ascending = list(self.orders) == sorted(set(self.orders)) and bool(self.orders)
        check.require(ascending and min(self.orders) >= 2, "orders", "ascending and 2 or more", self.orders)

    @property
    def width(self) -> int:
        """Width of what is looked up for a token: all heads of all orders."""
        return len(self.orders) * self.heads * self.head_dim


@dataclass(frozen=True)
class ModelConfig:
    """A model to the parameter. `from_dict` and the constructor refuse what doesn't fit, in one line (ValueError)."""

    pattern: str  # a letter per layer: M Mamba-2, E experts, * attention
    hidden_size: int
    vocab_size: int
    mamba_heads: int
    mamba_head_dim: int
    mamba_groups: int
    mamba_state: int
    attention_heads: int
    attention_kv_heads: int
    attention_head_dim: int
    experts: int
    experts_per_token: int
    expert_size: int
    shared_expert_size: int
    mamba_conv: int = 4  # taps
    routed_scale: float = 2.5  # on the routed sum alone
    norm_eps: float = 1e-5
    max_sequence_length: int = 4096  # of prompt and answer together; nothing in the model depends on a position
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int = 3
    attention_backend: AttentionBackend = "auto"
    compressed_vocab_size: int | None = None  # V_c of the Engram compression; None: ids are not compressed
    engram: tuple[EngramConfig, ...] = ()

    def __post_init__(self) -> None:
        check = FieldChecks("config")
        check.types(self)
        bad = next((letter for letter in self.pattern if letter not in LAYER_LETTERS), None)
        check.require(bad is None and bool(self.pattern), "pattern", "letters of M, E and *", repr(bad or self.pattern))
        check.positive(self, *(f.name for f in dataclasses.fields(self) if f.type is int and "token_id" not in f.name))
        check.require(self.norm_eps > 0, "norm_eps", "positive", self.norm_eps)
        self._check_sizes(check)
        self._check_tokens(check)
        self._check_engram(check)

    def _check_sizes(self, check: FieldChecks) -> None:
        heads, groups = self.mamba_heads, self.mamba_groups
        check.require(heads % groups == 0, "mamba_groups", f"a divisor of mamba_heads = {heads}", groups)
        heads, kv_heads = self.attention_heads, self.attention_kv_heads
        check.require(heads % kv_heads == 0, "attention_kv_heads", f"a divisor of attention_heads = {heads}", kv_heads)
        wanted = f"1 to experts = {self.experts}"
        check.require(self.experts_per_token <= self.experts, "experts_per_token", wanted, self.experts_per_token)

    def _check_tokens(self, check: FieldChecks) -> None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            token = getattr(self, name)
            check.require(0 <= token < self.vocab_size, name, f"0 to {self.vocab_size - 1} (vocab_size - 1)", token)
        size = self.compressed_vocab_size
        fits = size is None or 1 <= size <= self.vocab_size
        check.require(fits, "compressed_vocab_size", f"1 to vocab_size = {self.vocab_size}", size)

    def _check_engram(self, check: FieldChecks) -> None:
        layers = [engram.layer for engram in self.engram]
        in_pattern = all(layer < len(self.pattern) for layer in layers)
        wanted = f"ascending layers of 0 to {len(self.pattern) - 1}"
        check.require(in_pattern and layers == sorted(set(layers)), "engram", wanted, layers)

    @property
    def mamba_width(self) -> int:
        """H·P."""
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv_width(self) -> int:
        """H·P + 2·G·N: the channels of x, B and C."""
        return self.mamba_width + 2 * self.mamba_groups * self.mamba_state

    def layers_of(self, letter: str) -> list[int]:
        """The indices of the layers of one kind."""
        return [i for i, kind in enumerate(self.pattern) if kind == letter]

    def without_engram(self) -> "ModelConfig":
        """The same model with its Engrams left out."""
        return dataclasses.replace(self, engram=(), compressed_vocab_size=None)

    def to_dict(self) -> dict[str, Any]:
        """A dict of numbers, strings, lists and dicts, that `from_dict` reads back; what is None is left out."""
        fields = dataclasses.asdict(self)
        fields["engram"] = [to_table(engram) for engram in fields["engram"]]
        return to_table(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """The config of a dict such as a TOML `[model]` table. ValueError names an unknown or a missing key."""
        engram = fields.get("engram", ())
        FieldChecks("config").require(isinstance(engram, (list, tuple)), "engram", "a list of tables", repr(engram))
        nested = {"engram": tuple(from_table(EngramConfig, table, "engram") for table in engram)}
        return from_table(cls, dict(fields) | nested, "config")


def load_preset(name: str | Path, **overrides: Any) -> ModelConfig:
    """The `[model]` table of a preset, or of a TOML file given by its path, with fields replaced.

    Raises:
        FileNotFoundError: there is no such preset or file; the message lists the presets. ValueError: a bad field.
    """
    return ModelConfig.from_dict(read_preset(name)["model"] | overrides)
