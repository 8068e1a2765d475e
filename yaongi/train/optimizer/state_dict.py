"""Loading the optimizer's state from a `state_dict`: checked in full, then copied, so each tensor keeps its dtype.

`torch.optim.Optimizer` would cast each value to its parameter's dtype: float32 master weights would lose half their
bits.
"""

from collections.abc import Mapping
from typing import Any

import torch

Groups = list[dict[str, Any]]
State = Mapping[str, torch.Tensor]


def load_state(groups: Groups, state: Mapping[Any, State], saved: Mapping[str, Any]) -> None:
    """Fill `state` and the groups' learning rates from a `state_dict`.

    Args:
        groups: the optimizer's groups.
        state: the optimizer's state by parameter.
        saved: the `state_dict`.

    Raises:
        ValueError: the groups or the shapes differ; nothing has changed then.
    """
    theirs: Groups = saved["param_groups"]
    _require("kinds of groups", [g["kind"] for g in groups], [g["kind"] for g in theirs])
    pairs: list[tuple[State, State]] = []
    for mine, their in zip(groups, theirs, strict=True):
        what = f"of kind {mine['kind']}"
        for key in ("stack", "stacked"):
            _require(f"{key} {what}", mine[key], their[key])
        _require(f"number of parameters {what}", len(mine["params"]), len(their["params"]))
        pairs += [(state[p], saved["state"][i]) for p, i in zip(mine["params"], their["params"], strict=True)]
    for ours, values in pairs:
        _require("shapes of a state", _shapes(ours), _shapes(values))
    for ours, values in pairs:
        for key, value in values.items():
            ours[key].copy_(value)
    for mine, their in zip(groups, theirs, strict=True):
        mine["lr"] = their["lr"]


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _require(what: str, wanted: object, got: object) -> None:
    if wanted != got:
        raise ValueError(f"optimizer: {what} must be {wanted}, got {got}")
