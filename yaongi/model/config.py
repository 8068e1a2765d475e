"""The model's configuration: `ModelConfig`, its validation, and the presets.

Letters in comments and docstrings: d = hidden_size, V = vocab_size. Mamba-2: H heads of width P, G groups, state of
size N. Experts: E experts, K of them per token, each of width F; the shared expert has width S.
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
Precision = Literal["bf16", "fp8"]
LAYER_LETTERS = "ME*"  # Mamba-2, experts, attention
PRECISION_ROLES = {  # of a layer's kind; the first one decides whether the layer runs in FP8
    "M": ("mamba_projections",),
    "E": ("shared_experts", "experts"),
    "*": ("attention_projections",),
}


@dataclass(frozen=True)
class EngramConfig:
    """One Engram, added before the mixer of one layer."""

    layer: int  # index in the pattern of the layer that gets it
    heads: int  # hash heads per n-gram order
    head_dim: int  # width of a table row
    rows: int  # table rows per head, rounded up to the next prime that no other head has
    orders: tuple[int, ...] = (2, 3)  # lengths of the n-grams
    gate: Gate = "paper"  # gate of a score s, paper: sigmoid(s); demo: sigmoid(sign(s)·sqrt(|s|))
    kernel: int = 4  # taps of the convolution; its dilation is the longest order
    seed: int = 0  # seed of the hash multipliers
    sparse_gradients: bool = True  # give the table a sparse gradient: only the rows that were read

    def __post_init__(self) -> None:
        check = FieldChecks("engram")
        check.types(self)
        check.positive(self, "heads", "head_dim", "rows", "kernel")
        check.require(self.layer >= 0, "layer", "0 or more", self.layer)
        ascending = list(self.orders) == sorted(set(self.orders)) and bool(self.orders)
        check.require(ascending and min(self.orders) >= 2, "orders", "ascending and 2 or more", self.orders)

    @property
    def width(self) -> int:
        """Width of a token's looked-up vector: all heads of all orders."""
        return len(self.orders) * self.heads * self.head_dim


@dataclass(frozen=True)
class PrecisionConfig:
    """Which products run in FP8 while training, by role; everything else keeps the model's dtype."""

    mamba_projections: Precision = "bf16"  # in_proj (its dt columns stay bf16 forwards) and out_proj of Mamba-2 layers
    attention_projections: Precision = "bf16"  # q, k, v and o of attention layers
    shared_experts: Precision = "bf16"  # both matrices of the shared expert
    experts: Precision = "bf16"  # the routed experts, with shared_experts; the weights' gradients stay bf16
    high_layers: tuple[int, ...] = (0, -1)  # layers that stay bf16 all the same; negative ones count from the end
    exact: bool = True  # add products in full float32; false: faster on Hopper and less exact, except in gradients
    margin: float = 4.0  # room above the largest value of the last steps before a cast saturates
    history: int = 16  # optimizer steps whose largest values decide the scale of the next one

    def __post_init__(self) -> None:
        check = FieldChecks("precision")
        check.types(self)
        check.positive(self, "history", "margin")
        paired = self.experts == "bf16" or self.shared_experts == "fp8"  # one norm writes the cast that both read
        check.require(paired, "experts", "bf16 where shared_experts is", self.experts)

    @property
    def roles(self) -> tuple[str, ...]:
        """The names of the roles in FP8."""
        return tuple(name for names in PRECISION_ROLES.values() for name in names if getattr(self, name) == "fp8")

    def layers(self, pattern: str) -> tuple[int, ...]:
        """Return the indices of the layers with FP8 products."""
        high = {layer % len(pattern) for layer in self.high_layers}
        chosen = [i for i, kind in enumerate(pattern) if PRECISION_ROLES[kind][0] in self.roles]
        return tuple(i for i in chosen if i not in high)


@dataclass(frozen=True)
class ModelConfig:
    """The model's architecture: its layers and every size."""

    pattern: str  # one letter per layer: M Mamba-2, E experts, * attention
    hidden_size: int  # width of the hidden state
    vocab_size: int  # size of the vocabulary; in training the tokenizer sets it
    mamba_heads: int  # heads of a Mamba-2 layer
    mamba_head_dim: int  # width of a Mamba-2 head
    mamba_groups: int  # groups of Mamba-2 heads that share B and C; divides mamba_heads
    mamba_state: int  # state size of Mamba-2, per channel
    attention_heads: int  # query heads of an attention layer
    attention_kv_heads: int  # key and value heads; divides attention_heads
    attention_head_dim: int  # width of an attention head
    experts: int  # routed experts of an expert layer
    experts_per_token: int  # routed experts that each token takes
    expert_size: int  # hidden width of a routed expert
    shared_expert_size: int  # hidden width of the shared expert
    mamba_conv: int = 4  # taps of the Mamba-2 convolution
    routed_scale: float = 2.5  # factor on the sum of the routed experts; the shared expert is not scaled
    norm_eps: float = 1e-5  # epsilon of the RMS norms
    max_sequence_length: int = 4096  # limit for generation, prompt and answer together; no weight depends on it
    pad_token_id: int = 0  # id of the padding token; in training the tokenizer sets it
    bos_token_id: int = 2  # id of the begin-of-text token; in training the tokenizer sets it
    eos_token_id: int = 3  # id of the end-of-text token; in training the tokenizer sets it
    stop_token_ids: tuple[int, ...] = ()  # ids of further tokens that end an answer, such as a chat turn's end
    attention_backend: AttentionBackend = "auto"  # auto: the fastest that is right for the device and data
    compressed_vocab_size: int | None = None  # compressed ids for Engram (V_c); training sets it; None: no compression
    engram: tuple[EngramConfig, ...] = ()  # the Engrams, by ascending layer
    precision: PrecisionConfig = PrecisionConfig()  # what is multiplied in FP8 while training; models are saved without

    def __post_init__(self) -> None:
        """Check the fields. Raises ValueError, with a message of one line, for one that doesn't fit."""
        check = FieldChecks("config")
        check.types(self)
        bad = next((letter for letter in self.pattern if letter not in LAYER_LETTERS), None)
        check.require(bad is None and bool(self.pattern), "pattern", "letters of M, E and *", repr(bad or self.pattern))
        check.positive(self, *(f.name for f in dataclasses.fields(self) if f.type is int and "token_id" not in f.name))
        check.require(self.norm_eps > 0, "norm_eps", "positive", self.norm_eps)
        self._check_sizes(check)
        self._check_tokens(check)
        self._check_engram(check)
        self._check_precision()

    def _check_precision(self) -> None:
        """Check that FP8 products have sizes that tensor cores take, and that `high_layers` are layers."""
        check, count = FieldChecks("precision"), len(self.pattern)
        fits = all(-count <= layer < count for layer in self.precision.high_layers)
        check.require(fits, "high_layers", f"layers of {-count} to {count - 1}", self.precision.high_layers)
        inner = {
            "mamba_projections": self.mamba_width,
            "shared_experts": self.shared_expert_size,
            "experts": self.expert_size,
            "attention_projections": self.attention_heads * self.attention_head_dim,
        }
        kinds = sorted({self.pattern[i] for i in self.precision.layers(self.pattern)})
        for role in (role for kind in kinds for role in PRECISION_ROLES[kind] if role in self.precision.roles):
            sizes = self.hidden_size, inner[role]
            if any(size % 16 for size in sizes):
                raise ValueError(f"linear: sizes must be multiples of 16 for fp8, got {sizes[0]} and {sizes[1]}")

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
        fits = all(0 <= token < self.vocab_size for token in self.stop_token_ids)
        check.require(fits, "stop_token_ids", f"of 0 to {self.vocab_size - 1} (vocab_size - 1)", self.stop_token_ids)
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

    @property
    def answer_ends(self) -> list[int]:
        """All tokens that end an answer, the end of text first."""
        return [self.eos_token_id, *self.stop_token_ids]

    def layers_of(self, letter: str) -> list[int]:
        """Return the indices of the layers of one kind."""
        return [i for i, kind in enumerate(self.pattern) if kind == letter]

    def without_engram(self) -> "ModelConfig":
        """Return the config of the same model without its Engrams."""
        return dataclasses.replace(self, engram=(), compressed_vocab_size=None)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of numbers, strings, lists and dicts for `from_dict`.

        Fields that are None are left out, and so is the precision, which belongs to a training.
        """
        fields = dataclasses.asdict(self)
        del fields["precision"]
        fields["engram"] = [to_table(engram) for engram in fields["engram"]]
        return to_table(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Make a config from a dict such as a TOML `[model]` table. A ValueError names an unknown or missing key."""
        engram = fields.get("engram", ())
        FieldChecks("config").require(isinstance(engram, (list, tuple)), "engram", "a list of tables", repr(engram))
        nested: dict[str, Any] = {"engram": tuple(from_table(EngramConfig, table, "engram") for table in engram)}
        nested["precision"] = from_table(PrecisionConfig, fields.get("precision", {}), "precision")
        return from_table(cls, dict(fields) | nested, "config")


def load_preset(name: str | Path, **overrides: Any) -> ModelConfig:
    """Load the `[model]` table of a preset, or of a TOML file given by its path.

    Args:
        overrides: fields that replace those of the table.

    Raises:
        FileNotFoundError: there is no such preset or file; the message lists the presets.
        ValueError: a field is unknown, missing or has a wrong value.
    """
    return ModelConfig.from_dict(read_preset(name)["model"] | overrides)
