"""How much memory a run will need, by part, computed before it starts.

Weights, masters, gradients and moments follow from the parameters. Activations come from a trial of one micro-batch on
the meta device: forward and backward run with shapes alone, and every tensor is counted while it is alive.
"""

import resource
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yaongi.kernels import info
from yaongi.model import Yaongi, attention
from yaongi.model.roles import parameter_roles

_REFERENCES = {"cpu": 1.6, "cuda": 1.4}  # measured: what an op's reference holds while it runs isn't seen from outside
_GPU_BASE = 100_000_000  # workspaces of cuBLAS and of the kernels, as the allocator counts them


@dataclass(frozen=True)
class Memory:
    """Bytes of a process at its fullest."""

    weights: int
    masters: int
    gradients: int
    momentum: int
    moments: int  # of AdamW and of the tables
    activations: int  # what a forward and backward pass adds at its peak
    base: int  # the program itself

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def predict(
    model: Yaongi,
    rows: int,
    length: int,
    *,
    momentum: torch.dtype | None,
    device: torch.device,
    shards: int,
) -> Memory:
    """The memory of training ``model``, which lies on the meta device, with micro-batches (rows, length).

    Args:
        momentum: dtype of the matrices' momentum; None: they take AdamW.
        shards: processes that share weights, gradients and state.
    """
    roles = parameter_roles(model)
    sizes = {"weights": 0, "masters": 0, "gradients": 0, "momentum": 0, "moments": 0}
    for name, parameter in model.named_parameters():
        role, count = roles[name], parameter.numel() // shards
        sizes["weights"] += count * parameter.element_size()
        sizes["masters"] += 4 * count if parameter.element_size() < 4 else 0
        if role.kind != "table" or shards == 1:  # a sharded run's tables have sparse gradients
            sizes["gradients"] += 4 * count
        if role.kind in ("table", "adamw") or momentum is None:
            sizes["moments"] += 8 * count
        else:
            sizes["momentum"] += momentum.itemsize * count
    activations = _activations(model, rows, length, device)
    if device.type == "cpu" or not _has_kernel("mamba_scan"):
        activations = round(_REFERENCES[device.type] * activations)
    base = _GPU_BASE if device.type == "cuda" else resident_bytes()
    return Memory(**sizes, activations=activations, base=base)


def resident_bytes() -> int:
    """The most memory this process has had so far, as the system counts it.

    On Linux from the process's own status: `getrusage` also counts what its parent had when it was forked.
    """
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _has_kernel(op: str) -> bool:
    """Whether this machine runs an op by more than its reference."""
    return any(a.op == op and a.backend != "reference" and a.reason is None for a in info())


def _activations(model: Yaongi, rows: int, length: int, device: torch.device) -> int:
    """Bytes that one forward and backward pass adds at its peak, beside weights and gradients."""
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    documents = torch.zeros(rows, length, dtype=torch.int32, device="meta") if device.type == "cpu" else None
    dense = [p for name, p in model.named_parameters() if not name.endswith("engram.table.weight")]
    for parameter in dense:
        parameter.grad = torch.zeros_like(parameter)  # so that gradients aren't counted as activations
    with PeakMode() as peak, _fused_attention():
        losses = model.losses(ids, documents)
        (losses.cross_entropy_sum + losses.balance).backward()
    model.zero_grad(set_to_none=True)
    return peak.peak


class PeakMode(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and still alive, and keeps the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in before and storage._cdata not in self._seen:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_sparse)
    return [tensor.untyped_storage() for tensor in tensors]


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Gives attention the memory of the fused kernels: on the meta device torch would keep every probability."""
    former = attention.scaled_attention
    attention.scaled_attention = _Attention.apply
    try:
        yield
    finally:
        attention.scaled_attention = former


class _Attention(torch.autograd.Function):
    """Shapes of a fused attention: output and log-sum of each query are kept, and a mask as numbers."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty_like(q)
        logsum = q.new_empty(q.shape[:-1], dtype=torch.float32)
        kept = () if mask is None else (torch.empty_like(mask, dtype=q.dtype),)
        ctx.save_for_backward(q, k, v, out, logsum, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors[:3]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
