"""Teon and Muon for parameters that FSDP shards by rows: momentum stays sharded, update directions are gathered.

Experts are sharded by expert: each process orthogonalises its own, and nothing is gathered.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from yaongi.kernels import newton_schulz, teon_direction, teon_weight
from yaongi.train.config import Training
from yaongi.train.distributed.sharding import local_part, local_rows
from yaongi.train.optimizer.idle_experts import Active, local_mask
from yaongi.train.optimizer.partition import TeonStack

States = Mapping[Any, dict[str, Any]]  # by parameter


def step_sharded(
    units: Sequence[TeonStack],
    states: States,
    split_rows: Mapping[nn.Parameter, slice],
    train: Training,
    lr: float,
    active: Active,
) -> dict[nn.Parameter, torch.Tensor]:
    """Do one step of all `units`.

    Args:
        split_rows: rows of matrices that AdamW updates instead.
        active: the experts to update.

    Returns:
        The unsharded gradients of those rows.
    """
    whole: dict[nn.Parameter, torch.Tensor] = {}
    last = {p: number for number, unit in enumerate(units) for p in unit.parameters}
    split_gradients = {}
    for number, unit in enumerate(units):
        for parameter in unit.parameters:
            if parameter not in whole:
                rows = split_rows.get(parameter)
                mask = local_mask(parameter, active)
                whole[parameter] = _direction(parameter, states[parameter]["momentum"], rows, train.momentum, mask)
                if rows is not None:
                    split_gradients[parameter] = whole[parameter][rows].clone()
        _apply(unit, [whole[p] for p in unit.parameters], states, train, lr, local_mask(unit.parameters[0], active))
        for parameter in unit.parameters:
            if last[parameter] == number:
                del whole[parameter]
    return split_gradients


def _direction(
    parameter: nn.Parameter, momentum: DTensor, raw: slice | None, mu: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """Update the momentum buffer and return the Nesterov direction.

    Args:
        mask: which of this process's experts are updated; None: all.
        raw: rows for which the gradient itself is returned, and whose momentum stays 0.

    Returns:
        The unsharded direction; for experts only this process's shard.
    """
    gradient = parameter.grad
    if not isinstance(gradient, DTensor):
        raise RuntimeError("optimizer: a sharded parameter must have a sharded gradient, got another")
    g = gradient.to_local().to(torch.promote_types(gradient.dtype, torch.float32))
    direction = teon_direction(g, momentum.to_local(), mu, active=mask)
    if raw is not None:
        here = local_rows(parameter, raw).of_local
        momentum.to_local()[here], direction[here] = 0, g[here]
    if parameter.dim() == 3:
        return direction
    shape, stride = gradient.shape, gradient.stride()
    return DTensor.from_local(
        direction, gradient.device_mesh, gradient.placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


def _apply(
    unit: TeonStack,
    directions: Sequence[torch.Tensor],
    states: States,
    train: Training,
    lr: float,
    mask: torch.Tensor | None,
) -> None:
    """Orthogonalise the unit's matrices jointly and update this process's rows of them."""
    experts = unit.parameters[0].dim() == 3
    chosen = [d if unit.rows is None else d[unit.rows] for d in directions]
    if not chosen[0].numel():
        return  # fewer experts than processes
    m, n = chosen[0].shape[-2:]
    for parameter, o in zip(unit.parameters, newton_schulz(torch.cat(chosen, -1)).split(n, -1), strict=True):
        weight = local_part(states[parameter].get("master", parameter.detach()))
        if not experts:
            here = local_rows(parameter, unit.rows)
            weight, o = weight[here.of_local], o[here.of_rows]
        weight.copy_(teon_weight(weight, o, (m, n), lr, train.weight_decay, mask))
        if "master" in states[parameter]:
            local_part(parameter.detach()).copy_(local_part(states[parameter]["master"]))
