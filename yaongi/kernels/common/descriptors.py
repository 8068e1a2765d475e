"""TMA descriptors of tensors, and tensors that TMA can address."""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

Tensor = torch.Tensor


def descriptor(t: Tensor, *box: int) -> TensorDescriptor:
    """For boxes of the last dimensions of a tensor."""
    return TensorDescriptor.from_tensor(t, [*(1 for _ in t.shape[len(box) :]), *box])


def matrix_descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For boxes of rows × columns of a tensor seen as a matrix: all but its last dimension are rows."""
    return descriptor(t.view(-1, t.shape[-1]), rows, columns)


def addressable(t: Tensor) -> Tensor:
    """The tensor, or a copy where TMA can't read it: it wants unit stride along the last dimension and 16-byte rows."""
    strides = all(s > 0 and s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
    if t.stride(-1) == 1 and strides and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)
