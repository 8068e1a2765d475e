"""The size of a model and its FLOPs, from shapes alone."""

from dataclasses import dataclass

from torch import nn

from yaongi.model.config import ModelConfig

SCAN_CHUNK = 128  # Q, the chunk length of the scan
PARTS = (  # (part, substring): a parameter belongs to the first part whose substring its name contains
    ("engram tables", "engram.table."),
    ("engram projections", "engram."),
    ("embedding", "embeddings."),
    ("head", "lm_head."),
    ("experts", "mixer.experts."),
    ("shared experts", "mixer.shared_experts."),
    ("router", "mixer.gate."),
    ("mamba", "mixer.in_proj."),
    ("mamba", "mixer.conv1d."),
    ("mamba", "mixer.A_log"),
    ("mamba", "mixer.D"),
    ("mamba", "mixer.dt_bias"),
    ("mamba", "mixer.norm."),
    ("mamba", "mixer.out_proj."),
    ("attention", "mixer."),
    ("norms", "norm"),
)


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; buffers such as the correction bias are not counted."""

    total: int
    active: int  # without the input embedding, the Engram tables and the experts that a token doesn't take
    engram_tables: int
    parts: dict[str, int]  # adds up to the total

    def without_engram(self) -> "ParameterCounts":
        """Return the counts of the same model without its Engrams."""
        parts = {part: number for part, number in self.parts.items() if not part.startswith("engram")}
        left_out = self.parts.get("engram projections", 0)
        return ParameterCounts(self.total - self.engram_tables - left_out, self.active - left_out, 0, parts)


def count_parameters(model: nn.Module, config: ModelConfig) -> ParameterCounts:
    """Count the parameters of a model; on the meta device that needs no memory, whatever the model's size."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = next(part for part, mark in PARTS if mark in name)
        parts[part] = parts.get(part, 0) + parameter.numel()
    tables, experts = parts.get("engram tables", 0), parts.get("experts", 0)
    idle = experts // config.experts * (config.experts - config.experts_per_token)
    total = sum(parts.values())
    return ParameterCounts(total, total - parts["embedding"] - tables - idle, tables, parts)


def bytes_per_step(counts: ParameterCounts, config: ModelConfig, batch: int, position: int, itemsize: int = 2) -> float:
    """Return the least bytes that a step of generation reads and writes.

    They are the weights that the batch's tokens need (of the routed experts the share that is expected to be chosen,
    if each token takes any K of the E), the rows of embedding and Engram tables, Mamba-2's float32 states and
    convolutions, read and written, and keys and values of all positions so far.

    Args:
        batch: rows.
        position: tokens of each row that were read before.
        itemsize: bytes per number of weights, keys and values.
    """
    experts = counts.parts.get("experts", 0)
    chosen = 1 - (1 - config.experts_per_token / config.experts) ** batch
    weights = counts.total - counts.parts["embedding"] - counts.engram_tables - experts * (1 - chosen)
    rows = batch * (config.hidden_size + sum(engram.width for engram in config.engram))
    states = 2 * batch * config.mamba_width * config.mamba_state * 4
    convolutions = 2 * batch * config.conv_width * (config.mamba_conv - 1) * itemsize
    keys = 2 * batch * (position + 1) * config.attention_kv_heads * config.attention_head_dim * itemsize
    mamba, attention = len(config.layers_of("M")), len(config.layers_of("*"))
    return itemsize * (weights + rows) + mamba * (states + convolutions) + attention * keys


def cache_bytes(config: ModelConfig, rows: int, capacity: int, itemsize: int = 2) -> int:
    """Return the bytes of the caches of rows that have room for `capacity` tokens each (`Cache` of decoding.py).

    Args:
        itemsize: bytes per number of keys, values and convolutions' inputs.
    """
    keys = 2 * capacity * config.attention_kv_heads * config.attention_head_dim * itemsize
    state = config.mamba_width * config.mamba_state * 4 + config.conv_width * (config.mamba_conv - 1) * itemsize
    inputs = sum(max(engram.orders) * (engram.kernel - 1) for engram in config.engram) * config.hidden_size * itemsize
    longest = max((max(engram.orders) for engram in config.engram), default=1)
    bookkeeping = capacity + 8 * (2 + longest - 1)
    layers = len(config.layers_of("*")) * keys + len(config.layers_of("M")) * state
    return rows * (layers + inputs + bookkeeping)


def flops_per_token(config: ModelConfig, active: int, sequence_length: int) -> float:
    """Return the model FLOPs per token of training, forward and backward, for `active` parameters.

    They are 6 · active + 3 · (Mamba-2 layers · scan + attention layers · attention), with
    scan = 2·(G·N·Q/2 + H·P·Q/2 + 2·H·P·N), Q = 128, and causal attention = 2·L·(query heads)·(head width).
    """
    width, state = config.mamba_width, config.mamba_state
    scan = 2 * (config.mamba_groups * state * SCAN_CHUNK / 2 + width * SCAN_CHUNK / 2 + 2 * width * state)
    attention = 2 * sequence_length * config.attention_heads * config.attention_head_dim
    layers = len(config.layers_of("M")) * scan + len(config.layers_of("*")) * attention
    return 6 * active + 3 * layers
