"""Tensors that stay float32 when their module is narrowed."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

Tensor = torch.Tensor


class KeepsFloat32(nn.Module):
    """A module whose tensors named in `FLOAT32` are moved by `.to()`, `.half()` and `.bfloat16()`, but never narrowed.

    They learn by steps that 16 bits would round away.
    """

    FLOAT32: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        tensors = [getattr(self, name) for name in self.FLOAT32]
        kept = {id(t) for t in (*tensors, *(t.grad for t in tensors if t.is_leaf)) if t is not None}

        def moved(t: Tensor) -> Tensor:
            result = fn(t)
            narrowed = id(t) in kept and result.is_floating_point() and result.dtype.itemsize < 4
            return t.to(result.device) if narrowed else result

        for child in self.children() if recurse else ():
            child._apply(fn)
        return super()._apply(moved, recurse=False)
