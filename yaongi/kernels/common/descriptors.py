"""TMA descriptors of tensors."""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

Tensor = torch.Tensor
UNUSED = 16  # stride of a dimension of size 1: any multiple of 16 bytes will do


def descriptor(t: Tensor, *box: int) -> TensorDescriptor:
    """Return a TMA descriptor whose box covers the last dimensions of a tensor, and 1 along the others."""
    strides = [stride if n > 1 else UNUSED for n, stride in zip(t.shape, t.stride(), strict=True)]
    strides[-1] = 1
    return TensorDescriptor(t, list(t.shape), strides, [*(1 for _ in t.shape[len(box) :]), *box])


def matrix_descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Return a TMA descriptor for boxes of rows × columns; all dimensions but the last are flattened into rows."""
    return descriptor(t.view(-1, t.shape[-1]), rows, columns)
