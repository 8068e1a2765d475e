"""Parameters sharded over the processes by FSDP2, and parameters that stay unsharded.

For `--parallel fsdp`, where whole weights don't fit (see `replicas`): each process holds a shard of every parameter,
split along its first dimension, and FSDP averages the gradients. Parameters that FSDP can't hold stay unsharded on
every process: those of another dtype than the rest, and tables with sparse gradients. Theirs are averaged here.
"""

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from yaongi.model.initialize import Part, all_rows
from yaongi.train.distributed.replicas import sum_of_squares
from yaongi.world import World

TABLES = "engram.table.weight"  # how the names of Engram's tables end


def shard(model: nn.Module, layers: Iterable[nn.Module], methods: Iterable[str], world: World) -> None:
    """Shard each of `layers` and then the rest of `model` over the processes; with one process do nothing.

    The shards of bfloat16 weights are float32: they are the master weights. FSDP gathers them as bfloat16 for the
    forward and backward pass. Gradients are reduced and kept in float32.

    Args:
        methods: names of the methods of `model`, other than `forward`, that run the model.
    """
    if world.mesh is None:
        return
    torch.sparse.check_sparse_tensor_invariants.disable()  # said, so that torch doesn't warn in every step
    # The warning is about changing such a view in place, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    usual, whole = _kept_whole(model)
    wide = torch.promote_types(usual, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=usual, reduce_dtype=wide, cast_forward_inputs=False)
    for parameter in model.parameters():
        if parameter not in whole:
            parameter.data = parameter.data.to(wide)
    for module in (*layers, model):
        fully_shard(module, mesh=world.mesh, ignored_params=whole, mp_policy=policy)
    for method in methods:
        register_fsdp_forward_method(model, method)


def _kept_whole(model: nn.Module) -> tuple[torch.dtype, set[nn.Parameter]]:
    """Return the dtype of most weights, and the parameters to leave unsharded: other dtypes and Engram tables."""
    sizes = Counter[torch.dtype]()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    usual = sizes.most_common(1)[0][0]
    return usual, {p for name, p in model.named_parameters() if p.dtype != usual or name.endswith(TABLES)}


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is sharded over the processes."""
    return isinstance(tensor, DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a sharded tensor; the tensor itself if it isn't sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class LocalRows:
    """The intersection of a range of rows with the rows of this process."""

    of_local: slice  # counted from the first row of this process's shard
    of_rows: slice  # counted from the first row of the range


def local_rows(tensor: torch.Tensor, rows: slice | None) -> LocalRows:
    """Return which of `rows` (None: all) of a tensor sharded by rows lie on this process; may be empty."""
    if not isinstance(tensor, DTensor):
        raise TypeError(f"distributed: tensor must be a DTensor, got {type(tensor).__name__}")
    total, size = tensor.shape[0], tensor.device_mesh.size()
    per_process = -(-total // size)
    first = min(total, per_process * tensor.device_mesh.get_local_rank())
    last = first + tensor.to_local().shape[0]
    start, stop = (0, total) if rows is None else (rows.start, rows.stop)
    low = min(max(first, start), stop)
    high = max(low, min(last, stop))
    return LocalRows(slice(max(0, low - first), max(0, high - first)), slice(low - start, high - start))


def own_part(name: str, parameter: nn.Parameter) -> Part:
    """Return the rows of a parameter that lie on this process."""
    if not is_sharded(parameter):
        return all_rows(name, parameter)
    return Part(local_part(parameter.data), local_rows(parameter, None).of_rows.start, len(parameter))


class Shards:
    """The parameters of a model sharded by FSDP2: the counterpart of `Replicas`."""

    in_place = False

    def __init__(self, model: nn.Module, world: World, dtype: torch.dtype) -> None:
        """Take a model that `shard` has sharded, and round its weights to what they are in one process.

        Args:
            dtype: of its weights before.
        """
        self._world, self.loss_scale = world, world.size  # FSDP averages gradients: × size gives their sum
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        # Shards in float32 of weights that are narrower: a checkpoint holds them as the master copies that they are.
        self.masters = {p for p in self._parameters if is_sharded(p) and p.element_size() > dtype.itemsize}
        for parameter in self.masters:
            here = local_part(parameter.detach())
            here.copy_(here.to(dtype))

    def owns(self, parameter: nn.Parameter) -> bool:
        """Return whether this process keeps state of a parameter: of all."""
        return True

    def own(self, tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Return the tensor: it is sharded, or whole on every process."""
        return tensor

    def own_experts(self, tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Return the tensor (E, …): which experts lie here follows from their weights."""
        return tensor

    def saved(self, tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Return a state tensor as a checkpoint takes it."""
        return tensor

    def zero_gradients(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Average the gradients of unsharded parameters, dense or sparse, as FSDP has done for shards."""
        for parameter in self._parameters:
            gradient = parameter.grad
            if is_sharded(parameter):
                continue
            if gradient is None:
                raise RuntimeError(f"distributed: a parameter of shape {tuple(parameter.shape)} has no gradient")
            sparse = gradient.is_sparse
            whole = _gathered(gradient.coalesce(), self._world) if sparse else self._world.all_reduce(gradient)
            parameter.grad = whole.div_(self._world.size)

    def gather_weights(self) -> None:
        """Do nothing: FSDP gathers weights where they are used."""

    @torch.no_grad()
    def sum_of_squares(self) -> torch.Tensor:
        """Return this process's part of the squared norm of all gradients, a float64 scalar."""
        counted = [_values(g) for g in self._gradients() if is_sharded(g) or self._world.is_main]
        return sum_of_squares(counted, self._world.device)

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients."""
        torch._foreach_mul_([_values(gradient) for gradient in self._gradients()], factor)

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]


def _values(gradient: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a gradient that lie on this process; a sparse one must be coalesced."""
    return gradient.values() if gradient.is_sparse else local_part(gradient)


def _gathered(gradient: torch.Tensor, world: World) -> torch.Tensor:
    """Return the sum of a coalesced sparse gradient over the processes."""
    count = torch.tensor([gradient._nnz()], device=gradient.device)
    counts = [torch.empty_like(count) for _ in range(world.size)]
    dist.all_gather(counts, count)
    most = max(int(c) for c in counts)
    indices = gradient.indices().new_zeros(gradient.sparse_dim(), most)
    values = gradient.values().new_zeros(most, *gradient.values().shape[1:])
    indices[:, : gradient._nnz()], values[: gradient._nnz()] = gradient.indices(), gradient.values()
    all_indices = [torch.empty_like(indices) for _ in range(world.size)]
    all_values = [torch.empty_like(values) for _ in range(world.size)]
    dist.all_gather(all_indices, indices)
    dist.all_gather(all_values, values)
    kept = [int(c) for c in counts]
    summed = torch.sparse_coo_tensor(
        torch.cat([i[:, :n] for i, n in zip(all_indices, kept, strict=True)], 1),
        torch.cat([v[:n] for v, n in zip(all_values, kept, strict=True)]),
        gradient.shape,
        check_invariants=False,
    )
    return summed.coalesce()
