"""Parameters that the same processes hold, and the collectives that keep them equal there.

Gradients are reduced and scattered to the owners, in float32 and in place; weights are gathered after the update, in
place too. For that, each parameter that has owners lies in a buffer of equal chunks, one for each owner: split
parameters in one each, padded to whole chunks, and all others together in one.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from yaongi.train.distributed.ownership import Ownership
from yaongi.world import all_gather, reduce_scatter

Tensor = torch.Tensor
Named = dict[str, nn.Parameter]
Group = dist.ProcessGroup | None  # None: this process alone
_ALIGNMENT = 128  # numbers; the kernels need addresses that are multiples of 16 bytes


@dataclass(frozen=True)
class Holders:
    """The processes that hold the same parameters, as one of them sees them: groups of owners, copies of each other."""

    ownership: Ownership = field(default_factory=Ownership)
    owner: int = 0  # this process's number in its group of owners
    copy: int = 0  # the number of that group
    owners: Group = None  # the group of owners
    copies: Group = None  # the processes that own the same part
    everyone: Group = None
    mesh: DeviceMesh | None = None  # all processes among which rows are divided
    part: int = 0  # where other processes hold the other rows: the number of this part of them
    parts: int = 1  # and how many there are


@dataclass(frozen=True)
class Buffer:
    """The weights and gradients of some parameters, (owners · chunk, …), on every process."""

    weight: Tensor
    gradient: Tensor
    own: slice  # this process's chunk


class Held:
    """Parameters with the same holders; what has owners lies in buffers, unless this process alone holds them."""

    def __init__(self, named: Named, holders: Holders) -> None:
        """Move the parameters that have owners into buffers."""
        self.named, self._holders, self._ownership = named, holders, holders.ownership
        self._rows = {p: self._ownership.rows(name, holders.owner) for name, p in named.items()}
        self._gathered = [p for name, p in named.items() if name in self._ownership]
        self._buffers: list[Buffer] = []
        self._shared: list[Tensor] = []  # the gradients of parameters without owners, a flat tensor for each dtype
        if holders.everyone is not None:
            self._make_buffers()

    def owns(self, parameter: nn.Parameter) -> bool:
        """Return whether this process owns rows of a parameter."""
        rows = self._rows[parameter]
        return rows is None or rows.start < min(rows.stop, len(parameter))

    def own(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return the rows that this process owns of a tensor of a parameter's shape."""
        rows = self._rows[parameter]
        return tensor if rows is None else tensor[rows]

    def held(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return the rows of all parts that this process holds."""
        count, part = len(parameter), self._holders.part
        return tensor[part * count : (part + 1) * count]

    def saved(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return own rows, of all the state, as a checkpoint takes them: as a part of all rows."""
        rows, holders = self._rows[parameter], self._holders
        whole = holders.parts == 1 and (rows is None or rows.start == rows.stop)
        if whole or tensor.ndim == 0 or holders.mesh is None:
            return tensor
        shape = torch.Size((holders.parts * len(parameter), *tensor.shape[1:]))
        stride, places = torch.empty(shape, device="meta").stride(), [Shard(0)] * holders.mesh.ndim
        if tensor.storage_offset():  # torch can't copy a DTensor whose part begins inside a storage
            tensor = torch.from_dlpack(tensor)  # the same memory, as a storage of its own
        return DTensor.from_local(tensor, holders.mesh, places, run_check=False, shape=shape, stride=stride)

    def gradients(self) -> list[Tensor]:
        """Return all gradients, of which some may be missing."""
        lying = [buffer.gradient for buffer in self._buffers] + self._shared
        return lying or [p.grad for p in self.named.values() if p.grad is not None]

    def own_gradients(self) -> list[Tensor]:
        """Return the gradients that the update of this process reads."""
        lying = [buffer.gradient[buffer.own] for buffer in self._buffers] + self._shared
        return lying or self.gradients()

    def counted_gradients(self) -> list[Tensor]:
        """Return a share of the gradients such that those of all holders are each of them once."""
        if self._holders.everyone is None:
            return self.gradients()
        first = self._holders.copy == 0
        own = [buffer.gradient[buffer.own] for buffer in self._buffers] if first else []
        return own + (self._shared if first and self._holders.owner == 0 else [])

    def reduce_gradients(self) -> None:
        """Sum the gradients over the holders: afterwards each has the sums of what it owns."""
        for buffer in self._buffers:
            own = buffer.gradient[buffer.own]
            reduce_scatter(own, buffer.gradient, group=self._holders.owners)
            if self._holders.copies is not None:
                dist.all_reduce(own, group=self._holders.copies)
        for gradient in self._shared:
            dist.all_reduce(gradient, group=self._holders.everyone)

    def gather_weights(self) -> None:
        """Give every holder the weights that their owners have updated."""
        for buffer in self._buffers:
            all_gather(buffer.weight, buffer.weight[buffer.own], group=self._holders.owners)
        torch.autograd.graph.increment_version(self._gathered)  # by which casts to FP8 notice the change

    @torch.no_grad()
    def _make_buffers(self) -> None:
        """Move weights into the buffers, and make gradients that lie there too."""
        whole: dict[torch.dtype, Named] = defaultdict(dict)
        shared: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.named.items():
            parameter.grad_dtype = wide(parameter.dtype)
            if name in self._ownership.split:
                self._buffers.append(self._split(parameter, self._ownership.split[name]))
            elif name in self._ownership.owners:
                whole[parameter.dtype][name] = parameter
            else:
                shared[wide(parameter.dtype)].append(parameter)
        self._buffers += [self._arena(named) for named in whole.values()]
        for dtype, parameters in shared.items():
            sizes = [_aligned(p.numel()) for p in parameters]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=parameters[0].device)
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
        gradient = torch.zeros(shape, dtype=wide(parameter.dtype), device=parameter.device)
        parameter.grad = gradient[:rows]
        return Buffer(weight, gradient, self._chunk(chunk))

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
        gradient = torch.zeros(chunk * len(ends), dtype=wide(like.dtype), device=like.device)
        for name, parameter in named.items():
            owner, place = places[name]
            first = owner * chunk + place
            here = slice(first, first + parameter.numel())
            weight[here].view_as(parameter).copy_(parameter.data)
            parameter.data = weight[here].view_as(parameter)
            parameter.grad = gradient[here].view_as(parameter)
        return Buffer(weight, gradient, self._chunk(chunk))

    def _chunk(self, size: int) -> slice:
        return slice(self._holders.owner * size, (self._holders.owner + 1) * size)


def _aligned(numbers: int) -> int:
    return -(-numbers // _ALIGNMENT) * _ALIGNMENT


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter's gradient."""
    return torch.promote_types(dtype, torch.float32)
