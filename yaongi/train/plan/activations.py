"""Bytes of activations, counted by a forward and backward pass on the meta device, which computes only shapes."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yaongi.model import Yaongi


def activation_bytes(model: Yaongi, rows: int, length: int, device: torch.device) -> int:
    """Return the peak bytes of one forward and backward pass, without weights and gradients."""
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    documents = torch.zeros(rows, length, dtype=torch.int32, device="meta") if device.type == "cpu" else None
    dense = [p for name, p in model.named_parameters() if not name.endswith("engram.table.weight")]
    for parameter in dense:
        parameter.grad = torch.zeros_like(parameter)  # so that gradients aren't counted as activations
    model.refresh_fp8()
    with PeakMode() as peak:
        losses = model.losses(ids, documents)
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
