"""Experts spread over the processes of a node, for models that don't fit otherwise (`--parallel experts`).

Each of `degree` neighbouring processes holds as many experts of every layer. In a micro-batch they gather each other's
tokens, each applies its experts to all of them, and each gets the sums for its own tokens. No shape depends on the
routing, so a micro-batch can be recorded as a CUDA graph: an all-to-all of only the routed tokens would have to wait
for their number.

So an expert's gradient is that of all tokens of the node, and is summed over the nodes alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from yaongi.model import Yaongi
from yaongi.model.initialize import Part, PartOf, all_rows
from yaongi.model.mixers.moe import Experts, MoE
from yaongi.train.distributed.held import Group, Holders
from yaongi.train.distributed.ownership import Ownership
from yaongi.world import World, all_gather

Tensor = torch.Tensor


class ExpertRanks:
    """The processes over which the experts of every layer are spread, as one of them sees them."""

    def __init__(self, world: World, degree: int, ownership: Ownership) -> None:
        """Make the groups of processes.

        Args:
            degree: processes over which a layer's experts are spread; it divides all processes, and the experts.
            ownership: of the experts, among the processes that hold the same ones, one of each node.
        """
        self._degree, owners, nodes = degree, ownership.size, world.size // degree
        node, self._rank = divmod(world.rank, degree)
        ranks = torch.arange(world.size).view(nodes // owners, owners, degree).transpose(1, 2)
        # As a list: torch 2.11 goes by the strides of a tensor, which are in another order where a side is 1.
        mesh = DeviceMesh(world.device.type, ranks.tolist(), mesh_dim_names=("copy", "node", "owner"))
        self._mesh = mesh["node", "owner"]
        self._node = mesh["node"].get_group()
        self.holders = Holders(
            ownership,
            owner=node % owners,
            copy=node // owners,
            owners=mesh["owner"].get_group(),
            copies=mesh["copy"].get_group() if owners < nodes else None,
            everyone=mesh["copy" if owners == 1 else "owner"].get_group() if nodes > 1 else None,
            mesh=self._mesh,
            part=self._rank,
            parts=degree,
        )

    def parameters(self, model: nn.Module) -> set[nn.Parameter]:
        """Return the parameters that are spread."""
        return {p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}

    def spread(self, model: Yaongi) -> None:
        """Leave this process's experts in the model; its `state_dict` has them as parts of all, as `DTensor`s."""
        spread_experts(model, self._degree, self._rank, self._node)

        def as_parts(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
            for name, parameter in module.named_parameters():
                state[prefix + name] = self._part(state[prefix + name], parameter)

        for module in model.modules():
            if isinstance(module, Experts):
                module.register_state_dict_post_hook(as_parts)

    def part_in(self, model: nn.Module) -> PartOf:
        """Return the function that says which rows of a model's parameters are here."""
        parameters = self.parameters(model)
        spread = {name for name, parameter in model.named_parameters() if parameter in parameters}

        def part_of(name: str, parameter: nn.Parameter) -> Part:
            count = len(parameter)
            if name not in spread:
                return all_rows(name, parameter)
            return Part(parameter.data, self._rank * count, self._degree * count)

        return part_of

    def _part(self, tensor: Tensor, parameter: nn.Parameter) -> DTensor:
        shape = torch.Size((self._degree * len(parameter), *parameter.shape[1:]))
        places: list[Placement] = [Shard(0), Replicate()]
        return DTensor.from_local(tensor, self._mesh, places, run_check=False, shape=shape, stride=parameter.stride())


def spread_experts(model: Yaongi, degree: int, rank: int, node: Group) -> None:
    """Leave one of `degree` parts of each layer's experts in a model, and have tokens sent to the others.

    Args:
        node: the processes that hold the parts; on the meta device, which sends nothing, None.
    """
    count = model.config.experts // degree
    held = slice(rank * count, (rank + 1) * count)
    for module in model.modules():
        if isinstance(module, MoE):
            for name, whole in list(module.experts.named_parameters()):
                part = nn.Parameter(whole.detach()[held].clone(), requires_grad=whole.requires_grad)
                setattr(module.experts, name, part)
            module.dispatch = Dispatch(degree, held, node)


class Dispatch:
    """The way of tokens to the experts of all processes of a node, and back."""

    def __init__(self, degree: int, held: slice, node: Group) -> None:
        """Take the processes.

        Args:
            held: this process's experts.
        """
        self._degree, self._held, self._node = degree, held, node

    def __call__(
        self, experts: Callable[[Tensor, Tensor, Tensor], Tensor], rows: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        """Return the sum of all experts' outputs for this process's tokens, (T, d).

        Args:
            experts: of tokens, expert ids and weights, all T · degree of them, returns the sum of the experts here;
                it skips the id −1.
            rows: (T, d), of every process as many.
            ids: (T, K) int32.
            weights: (T, K).
        """
        everyone = self.gathered(ids) - self._held.start
        here = torch.where((everyone >= 0) & (everyone < self._held.stop - self._held.start), everyone, -1)
        return _Summed.apply(experts(_Gathered.apply(rows, self), here, _Gathered.apply(weights, self)), self)

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes of the node, (degree · T, …), in the order of their ranks."""
        found = tensor.new_empty(self._degree * len(tensor), *tensor.shape[1:])
        if not tensor.is_meta:
            all_gather(found, tensor.contiguous(), group=self._node)
        return found

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum over the node of the rows that are this process's, (T, …), of (degree · T, …).

        As many bytes move as in a reduce-scatter, whose sums would be rounded to bfloat16 at each process. Here they
        are formed in float32, in the order of ranks.
        """
        tensor = tensor.contiguous()
        found = torch.empty_like(tensor)
        if not tensor.is_meta:
            dist.all_to_all_single(found, tensor, group=self._node)
        return found.unflatten(0, (self._degree, -1)).sum(0)


class _Gathered(torch.autograd.Function):
    """The rows of all processes of the node; the gradients that all of them have of a row are summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return dispatch.gathered(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.dispatch.summed(grads[0]), None


class _Summed(torch.autograd.Function):
    """The sums for this process's rows; each process of the node gets the gradient of all rows."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return dispatch.summed(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.dispatch.gathered(grads[0]), None
