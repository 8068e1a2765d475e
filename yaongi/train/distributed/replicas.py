"""Whole weights on every process; gradients are summed, and weights updated by their owners, once a step.

The parameters' own collectives come after the last micro-batch (`held`), so a micro-batch is recorded as a CUDA graph
as on one GPU. Where experts are spread over the processes of a node (`experts`), they alone have other holders.
"""

from collections import defaultdict

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from yaongi.train.distributed.experts import ExpertRanks
from yaongi.train.distributed.held import Held, Holders, wide
from yaongi.train.distributed.ownership import Ownership
from yaongi.world import World

Tensor = torch.Tensor


class Replicas:
    """The parameters of a model that processes hold whole, and the collectives that keep them equal."""

    in_place = True  # gradients are accumulated in tensors that keep their address
    loss_scale = 1  # gradients are summed over the processes, not averaged
    masters: frozenset[nn.Parameter] = frozenset()  # parameters that are master copies: none

    def __init__(
        self,
        model: nn.Module,
        world: World,
        ownership: Ownership | None = None,
        experts: ExpertRanks | None = None,
    ) -> None:
        """Move the parameters that have owners into buffers; with one process do nothing.

        Args:
            ownership: the same on every process; needed with several.
            experts: over which the model's experts are spread already; None: every process holds all.
        """
        self._world = world
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        spread = set() if experts is None else experts.parameters(model)
        self._sets = [Held({n: p for n, p in named.items() if p not in spread}, _holders(world, ownership))]
        if experts is not None:
            self._sets.append(Held({n: p for n, p in named.items() if p in spread}, experts.holders))
        self._set = {p: held for held in self._sets for p in held.named.values()}

    def owns(self, parameter: nn.Parameter) -> bool:
        """Return whether this process owns rows of a parameter: then it keeps their state and updates them."""
        return self._set[parameter].owns(parameter)

    def own(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return the rows that this process owns of a parameter, or of a tensor of its shape."""
        return self._set[parameter].own(tensor, parameter)

    def own_experts(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return what belongs to the experts that this process owns of a parameter, of a tensor (E, …) of all."""
        held = self._set[parameter]
        return held.own(held.held(tensor, parameter), parameter)

    def saved(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return a state tensor of a parameter as a checkpoint takes it: own rows as part of all rows."""
        return self._set[parameter].saved(tensor, parameter)

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Set all gradients to zero, and make them first where they are missing."""
        for parameter in self._set:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=wide(parameter.dtype))
        torch._foreach_zero_([gradient for held in self._sets for gradient in held.gradients()])

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum the gradients over the processes: afterwards each has the sums of what it owns."""
        for held in self._sets:
            held.reduce_gradients()

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Give every process the weights that their owners have updated."""
        for held in self._sets:
            held.gather_weights()

    @torch.no_grad()
    def sum_of_squares(self) -> Tensor:
        """Return this process's part of the squared norm of all gradients, a float64 scalar."""
        counted = [gradient for held in self._sets for gradient in held.counted_gradients()]
        return sum_of_squares(counted, self._world.device)

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients that the update will read."""
        torch._foreach_mul_([gradient for held in self._sets for gradient in held.own_gradients()], factor)


def sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the squares of all numbers, a float64 scalar; the squares are summed in float32 at least."""
    alike: dict[torch.dtype, list[Tensor]] = defaultdict(list)  # one launch takes many of a dtype
    for tensor in tensors:
        alike[tensor.dtype].append(tensor)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for dtype, members in alike.items():
        norms = torch._foreach_norm(members, 2, dtype=wide(dtype))
        total += torch.stack(norms).double().square().sum()
    return total


def _holders(world: World, ownership: Ownership | None) -> Holders:
    """Return all processes as holders: in groups of owners, neighbours together."""
    if world.size == 1:
        return Holders()
    if world.mesh is None:
        raise ValueError(f"replicas: the world of {world.size} processes must have a mesh, got none")
    ownership = ownership or Ownership()
    size = ownership.size
    mesh, copies = world.mesh, None
    if size < world.size:
        shape = world.size // size, size
        both = init_device_mesh(world.device.type, shape, mesh_dim_names=("replica", "shard"))
        mesh, copies = both["shard"], both["replica"].get_group()
    return Holders(
        ownership,
        owner=world.rank % size,
        copy=world.rank // size,
        owners=mesh.get_group(),
        copies=copies,
        everyone=world.mesh.get_group(),
        mesh=mesh,
    )
