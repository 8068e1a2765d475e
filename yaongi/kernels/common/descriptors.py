"""TMA descriptors of tensors, and tensors that TMA can address."""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

Tensor = torch.Tensor


def descriptor(t: Tensor, *box: int) -> TensorDescriptor:
    """Return a TMA descriptor whose box covers the last dimensions of a tensor, and 1 along the others."""
    return TensorDescriptor.from_tensor(t, [*(1 for _ in t.shape[len(box) :]), *box])


def matrix_descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Return a TMA descriptor for boxes of rows × columns; all dimensions but the last are flattened into rows."""
    return descriptor(t.view(-1, t.shape[-1]), rows, columns)


def addressable(t: Tensor) -> Tensor:
    """Return the tensor, or a contiguous copy where TMA can't read it.

    TMA needs unit stride along the last dimension, and an address and other strides that are multiples of 16 bytes.
    """
    strides = all(s > 0 and s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
    if t.stride(-1) == 1 and strides and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)
