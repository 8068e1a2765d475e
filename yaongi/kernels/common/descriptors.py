"""TMA descriptors of tensors, remembered: making and encoding one costs the host as much as half a launch."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

Tensor = torch.Tensor
UNUSED = 16  # stride of a dimension of size 1: any multiple of 16 bytes will do
REMEMBERED = 1024  # most descriptors that are kept; then all are forgotten
INTERPRETED = triton.knobs.runtime.interpret  # the interpreter reads the tensor itself
_remembered: dict[tuple[object, ...], TensorDescriptor] = {}


@dataclass(frozen=True, slots=True)
class Address:
    """What a launch asks of a descriptor's tensor; the tensor itself would be kept alive."""

    dtype: torch.dtype
    address: int
    kind: tuple[object, ...]  # what a compiled kernel depends on: dtype and box
    encoded: dict[str, list[object]] = field(default_factory=dict)  # what launches pass, see launch.py

    def data_ptr(self) -> int:
        """Return the address of the first element."""
        return self.address


def descriptor(t: Tensor, *box: int, view: Callable[[Tensor], Tensor] | None = None) -> TensorDescriptor:
    """Return a TMA descriptor whose box covers the last dimensions of a tensor, and 1 along the others.

    Args:
        view: the descriptor is that of `view(t)`, which is made only where the descriptor isn't known.
    """
    key = (t.data_ptr(), t.shape, t.stride(), t.dtype, box, view)
    made = _remembered.get(key)
    if made is not None:
        return made
    t = view(t) if view else t
    strides = [stride if n > 1 else UNUSED for n, stride in zip(t.shape, t.stride(), strict=True)]
    strides[-1] = 1
    whole_box = [*(1 for _ in t.shape[len(box) :]), *box]
    base = t if INTERPRETED else Address(t.dtype, t.data_ptr(), (t.dtype, *whole_box))
    made = TensorDescriptor(base, list(t.shape), strides, whole_box)
    if not INTERPRETED:
        if len(_remembered) >= REMEMBERED:
            _remembered.clear()
        _remembered[key] = made
    return made


def matrix_descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Return a TMA descriptor for boxes of rows × columns; all dimensions but the last are flattened into rows."""
    return descriptor(t, rows, columns, view=flattened)


def flattened(t: Tensor) -> Tensor:
    """Return a tensor as a matrix: all dimensions but the last are flattened into rows."""
    return t.view(-1, t.shape[-1])
