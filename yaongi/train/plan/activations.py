"""Bytes of activations, counted by a forward and backward pass on the meta device, which computes only shapes."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yaongi.model import Yaongi
from yaongi.model.layers.accumulation import fused_accumulation
from yaongi.model.layers.compiled import planned_for_gpu


def activation_bytes(model: Yaongi, rows: int, length: int, device: torch.device, *, in_place: bool) -> int:
    """Return the peak bytes of one forward and backward pass, without weights and gradients.

    Args:
        in_place: on a GPU, whether gradients are added up where they lie, as by all ways but FSDP.
    """
    gpu = device.type == "cuda"
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    documents = None if gpu else torch.zeros(rows, length, dtype=torch.int32, device="meta")
    dense = [p for name, p in model.named_parameters() if in_place or not name.endswith("engram.table.weight")]
    for parameter in dense:  # have gradients, so that these aren't counted as activations
        wide = torch.promote_types(parameter.dtype, torch.float32) if in_place else parameter.dtype
        parameter.grad_dtype = wide
        parameter.grad = torch.zeros_like(parameter, dtype=wide)
    model.refresh_fp8()
    one = torch.ones((), device="meta")
    with planned_for_gpu(gpu), fused_accumulation(in_place), PeakMode() as peak:
        losses = model.losses(ids, documents, upstream=(one, one) if in_place else None)
        (losses.cross_entropy_sum + losses.balance).backward()
    model.zero_grad(set_to_none=True)
    return peak.peak


class PeakMode(TorchDispatchMode):
    """A dispatch mode that counts the bytes of the tensors made and still alive, and keeps their peak."""

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
