"""Whole weights on every process; gradients are summed, and weights updated by their owners, once a step.

Within a micro-batch nothing is communicated, so it is recorded as a CUDA graph as on one GPU. After the last one the
gradients are reduced and scattered to the owners, in float32 and in place; after the update the weights are gathered,
in place too. For that, each parameter that has owners lies in a buffer of equal chunks, one for each process: split
parameters in one each, padded to whole chunks, and all others together in one.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from yaongi.train.distributed.ownership import Ownership
from yaongi.world import World, all_gather, reduce_scatter

Tensor = torch.Tensor
Named = dict[str, nn.Parameter]
_ALIGNMENT = 128  # numbers; the kernels need addresses that are multiples of 16 bytes


@dataclass(frozen=True)
class Buffer:
    """The weights and gradients of some parameters, (size · chunk, …), on every process."""

    weight: Tensor
    gradient: Tensor
    own: slice  # this process's chunk


class Replicas:
    """The parameters of a model that every process holds whole, and the collectives that keep them equal."""

    in_place = True  # gradients are accumulated in tensors that keep their address
    loss_scale = 1  # gradients are summed over the processes, not averaged
    masters: frozenset[nn.Parameter] = frozenset()  # parameters that are master copies: none

    def __init__(self, model: nn.Module, world: World, ownership: Ownership | None = None) -> None:
        """Move the parameters that have owners into buffers; with one process do nothing.

        Args:
            ownership: the same on every process; needed with several.
        """
        self._world = world
        self._named: Named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._ownership = ownership or Ownership()
        size = self._ownership.size
        self._shard, self._replica = world.rank % size, world.rank // size
        self._rows = {p: self._ownership.rows(name, self._shard) for name, p in self._named.items()}
        self._buffers: list[Buffer] = []
        self._gathered = [p for name, p in self._named.items() if name in self._ownership]
        self._shared: list[Tensor] = []  # the gradients of shared parameters, a flat tensor for each dtype
        if world.size > 1:
            self._mesh, self._replica_group = _groups(world, size)
            self._make_buffers()

    def owns(self, parameter: nn.Parameter) -> bool:
        """Return whether this process owns rows of a parameter: then it keeps their state and updates them."""
        rows = self._rows[parameter]
        return rows is None or rows.start < min(rows.stop, len(parameter))

    def own(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return the rows that this process owns of a parameter, or of a tensor of its shape."""
        rows = self._rows[parameter]
        return tensor if rows is None else tensor[rows]

    def saved(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return a state tensor of a parameter as a checkpoint takes it: own rows as part of all rows."""
        rows = self._rows[parameter]
        if rows is None or rows.start == rows.stop or tensor.ndim == 0:
            return tensor
        shape = torch.Size((len(parameter), *tensor.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(tensor, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Set all gradients to zero, and make them first where they are missing."""
        for parameter in self._named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=_wide(parameter.dtype))
        gradients = [buffer.gradient for buffer in self._buffers] + self._shared
        torch._foreach_zero_(gradients or self._gradients())

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum the gradients over the processes: afterwards each has the sums of what it owns."""
        if self._world.size == 1:
            return
        for buffer in self._buffers:
            own = buffer.gradient[buffer.own]
            reduce_scatter(own, buffer.gradient, group=self._mesh.get_group())
            if self._replica_group is not None:
                dist.all_reduce(own, group=self._replica_group)
        for gradient in self._shared:
            self._world.all_reduce(gradient)

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Give every process the weights that their owners have updated."""
        if self._world.size == 1:
            return
        for buffer in self._buffers:
            all_gather(buffer.weight, buffer.weight[buffer.own], group=self._mesh.get_group())
        torch.autograd.graph.increment_version(self._gathered)  # by which casts to FP8 notice the change

    @torch.no_grad()
    def sum_of_squares(self) -> Tensor:
        """Return this process's part of the squared norm of all gradients, a float64 scalar."""
        if self._world.size == 1:
            return sum_of_squares(self._gradients(), self._world.device)
        counted = self._own_gradients() if self._replica == 0 else []
        return sum_of_squares(counted + (self._shared if self._world.is_main else []), self._world.device)

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients that the update will read."""
        several = self._world.size > 1
        torch._foreach_mul_(self._own_gradients() + self._shared if several else self._gradients(), factor)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._named.values() if p.grad is not None]

    def _own_gradients(self) -> list[Tensor]:
        return [buffer.gradient[buffer.own] for buffer in self._buffers]

    @torch.no_grad()
    def _make_buffers(self) -> None:
        """Move weights into the buffers, and make gradients that lie there too."""
        whole: dict[torch.dtype, Named] = defaultdict(dict)
        shared: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self._named.items():
            parameter.grad_dtype = _wide(parameter.dtype)
            if name in self._ownership.split:
                self._buffers.append(self._split(parameter, self._ownership.split[name]))
            elif name in self._ownership.owners:
                whole[parameter.dtype][name] = parameter
            else:
                shared[_wide(parameter.dtype)].append(parameter)
        self._buffers += [self._arena(named) for named in whole.values()]
        for dtype, parameters in shared.items():
            sizes = [_aligned(p.numel()) for p in parameters]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=self._world.device)
            for parameter, part in zip(parameters, flat.split(sizes), strict=True):
                parameter.grad = part[: parameter.numel()].view_as(parameter)
            self._shared.append(flat)

    def _split(self, parameter: nn.Parameter, chunk: int) -> Buffer:
        """Make the buffer of a parameter of which each process owns `chunk` rows."""
        shape, rows = (chunk * self._ownership.size, *parameter.shape[1:]), len(parameter)
        weight = parameter.data
        if shape[0] > rows:
            weight = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
            weight[:rows] = parameter.data
            parameter.data = weight[:rows]
        gradient = torch.zeros(shape, dtype=_wide(parameter.dtype), device=parameter.device)
        parameter.grad = gradient[:rows]
        return Buffer(weight, gradient, slice(self._shard * chunk, (self._shard + 1) * chunk))

    def _arena(self, named: Named) -> Buffer:
        """Make the buffer of whole matrices of one dtype: a chunk for each owner, as large as the largest."""
        sizes = {name: _aligned(p.numel()) for name, p in named.items()}
        ends = [0] * self._ownership.size
        places = {}
        for name, size in sizes.items():
            owner = self._ownership.owners[name]
            places[name] = owner, ends[owner]
            ends[owner] += size
        chunk, like = max(ends), next(iter(named.values()))
        weight = torch.zeros(chunk * len(ends), dtype=like.dtype, device=like.device)
        gradient = torch.zeros(chunk * len(ends), dtype=_wide(like.dtype), device=like.device)
        for name, parameter in named.items():
            owner, place = places[name]
            first = owner * chunk + place
            here = slice(first, first + parameter.numel())
            weight[here].view_as(parameter).copy_(parameter.data)
            parameter.data = weight[here].view_as(parameter)
            parameter.grad = gradient[here].view_as(parameter)
        return Buffer(weight, gradient, slice(self._shard * chunk, (self._shard + 1) * chunk))


def sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the squares of all numbers, a float64 scalar; the squares are summed in float32 at least."""
    alike: dict[torch.dtype, list[Tensor]] = defaultdict(list)  # one launch takes many of a dtype
    for tensor in tensors:
        alike[tensor.dtype].append(tensor)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for dtype, members in alike.items():
        norms = torch._foreach_norm(members, 2, dtype=_wide(dtype))
        total += torch.stack(norms).double().square().sum()
    return total


def _aligned(numbers: int) -> int:
    return -(-numbers // _ALIGNMENT) * _ALIGNMENT


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter's gradient."""
    return torch.promote_types(dtype, torch.float32)


def _groups(world: World, size: int) -> tuple[DeviceMesh, dist.ProcessGroup | None]:
    """Return the mesh of the `size` processes that share the parameters, and the group of those with the same part."""
    if world.mesh is None:
        raise ValueError(f"replicas: the world of {world.size} processes must have a mesh, got none")
    if size == world.size:
        return world.mesh, None
    shape = world.size // size, size
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replica", "shard"))
    return mesh["shard"], mesh["replica"].get_group()
