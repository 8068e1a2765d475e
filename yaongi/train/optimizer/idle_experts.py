"""Experts without tokens in a step: the optimizer leaves their weights and their state alone."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from yaongi.model import Yaongi
from yaongi.train.distributed.sharding import is_sharded, local_rows
from yaongi.train.optimizer.roles import parameter_roles

Active = Mapping[nn.Parameter, torch.Tensor]  # of a layer's experts (E, m, n): (E) bool, which got tokens


def expert_layers(model: Yaongi) -> dict[nn.Parameter, int]:
    """Return the parameters that hold experts, each with the number of its layer among the expert layers."""
    parameters, layers = dict(model.named_parameters()), model.config.layers_of("E")
    roles = parameter_roles(model)
    return {parameters[name]: layers.index(r.layer) for name, r in roles.items() if r.kind == "expert" and r.layer}


def local_mask(parameter: nn.Parameter, active: Active) -> torch.Tensor | None:
    """Return which of this process's experts are active, (E here) bool; None for another parameter."""
    mask = active.get(parameter)
    if mask is None or not is_sharded(parameter):
        return mask
    return mask[local_rows(parameter, None).of_rows]


@contextmanager
def left_alone(tensors: Iterable[torch.Tensor], mask: torch.Tensor | None) -> Iterator[None]:
    """Undo what the block changes in the matrices of `tensors`, (E, m, n) each, that `mask` excludes; None: nothing.

    A copy and a choice, so that the host need not know which: for the baseline only, for it takes memory.
    """
    copies = [] if mask is None else [(tensor, tensor.clone()) for tensor in tensors]
    yield
    for tensor, before in copies:
        tensor.copy_(torch.where(mask[:, None, None], tensor, before))  # type: ignore[index]
