"""The role of each parameter, which decides how the optimizer updates it."""

from dataclasses import dataclass
from typing import Literal

from yaongi.model.model import Yaongi

Kind = Literal["qkv", "muon", "expert", "adamw", "table"]
SPLIT_NAMES = ("z", "x", "B", "C", "dt")
DECAYED_BY_ADAMW = ("backbone.embeddings.weight", "lm_head.weight", "mixer.gate.weight")
MATRICES = (
    "mixer.o_proj.weight",
    "mixer.out_proj.weight",
    "mixer.shared_experts.up_proj.weight",
    "mixer.shared_experts.down_proj.weight",
    "engram.key_proj.weight",
    "engram.value_proj.weight",
)
EXPERTS = ("mixer.experts.up_proj", "mixer.experts.down_proj")
QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Split:
    """Rows start..stop of a matrix, updated as a matrix of its own ("muon") or by AdamW."""

    name: str  # z, x, B, C or dt
    start: int
    stop: int
    kind: Literal["muon", "adamw"]
    decay: bool


@dataclass(frozen=True)
class Role:
    """How one parameter is updated.

    The kinds: "qkv" is Teon, stacked with the parameter of the same `part` in the other attention layer of the pair
    (2i, 2i + 1); "muon" is Teon with K = 1; "expert" is Muon for each of the E matrices of (E, rows, columns); "table"
    is Adam with its learning rate times `table_lr_scale`, on a gradient that is sparse unless the config says
    otherwise; "adamw" is AdamW. The config's `stack` and `stacked` can change which matrices are stacked.
    """

    kind: Kind
    part: str  # the name inside its layer, such as mixer.in_proj.weight; q, k or v for qkv
    layer: int | None = None  # index in the pattern
    splits: tuple[Split, ...] = ()  # in_proj: its ranges of rows; empty: the parameter is updated as one
    decay: bool = False  # decoupled weight decay


def parameter_roles(model: Yaongi) -> dict[str, Role]:
    """Return the role of every parameter, in the order of `named_parameters`."""
    return {name: _role(name, model) for name, _ in model.named_parameters()}


def _role(name: str, model: Yaongi) -> Role:
    layer, part = None, name
    if name.startswith("backbone.layers."):
        _, _, index, part = name.split(".", 3)
        layer = int(index)
    letter = part.removeprefix("mixer.")[:1]
    if layer is not None and part == f"mixer.{letter}_proj.weight" and letter in QKV:
        return Role("qkv", letter, layer, decay=True)
    if part in MATRICES:
        return Role("muon", part, layer, decay=True)
    if part == "mixer.in_proj.weight":
        return Role("muon", part, layer, splits=_in_proj_splits(model), decay=True)
    if part in EXPERTS:
        return Role("expert", part, layer, decay=True)
    if part == "engram.table.weight":
        return Role("table", part, layer)
    return Role("adamw", part, layer, decay=part in DECAYED_BY_ADAMW)


def _in_proj_splits(model: Yaongi) -> tuple[Split, ...]:
    config = model.config
    group_width = config.mamba_groups * config.mamba_state
    sizes = (config.mamba_width, config.mamba_width, group_width, group_width, config.mamba_heads)
    splits, start = [], 0
    for name, size in zip(SPLIT_NAMES, sizes, strict=True):
        by_adamw = name == "dt"
        splits.append(Split(name, start, start + size, "adamw" if by_adamw else "muon", decay=not by_adamw))
        start += size
    return tuple(splits)
