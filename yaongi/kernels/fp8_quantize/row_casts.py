"""The elementwise casts to FP8 in Triton, in row order; the other order comes from `transpose8`."""

from typing import Any

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.fp8 import cast8, note_largest
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv
from yaongi.kernels.fp8_quantize.byte_transpose import transpose8_triton

Tensor = torch.Tensor
E4M3 = torch.float8_e4m3fn
ROWS, COLUMNS, WARPS = 16, 256, 4  # of a program's block


@triton.jit
def _place(T, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a program's rows (ROWS, 1) and columns (1, COLUMNS), and the mask."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < T) & (column < D)


@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "amax_ptr"])
def _quantize8_kernel(
    x_ptr,  # (T, D)
    x8_ptr,  # (T, D), contiguous
    scale_ptr,  # (), fp32
    amax_ptr,  # (), int32: the bits of a float32
    T,
    D,
    stride_x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Cast a block of x."""
    row, column, mask = _place(T, D, ROWS, COLUMNS)
    values = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    note_largest(amax_ptr, values)
    x8 = cast8(values, tl.load(scale_ptr), x8_ptr.dtype.element_ty)
    tl.store(x8_ptr + row * D + column, x8, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "amax_ptr"])
def _squared_relu8_kernel(
    h_ptr,  # (T, F)
    a8_ptr,  # (T, F), contiguous
    scale_ptr,  # (), fp32
    amax_ptr,  # (), int32: the bits of a float32
    T,
    F,
    stride_h,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute a = relu(h)² and cast it; NaN is not below zero, so it stays."""
    row, column, mask = _place(T, F, ROWS, COLUMNS)
    h = tl.load(h_ptr + row * stride_h + column, mask=mask, other=0.0).to(tl.float32)
    h = tl.where(h < 0, 0.0, h)
    values = h * h
    note_largest(amax_ptr, values)
    a8 = cast8(values, tl.load(scale_ptr), a8_ptr.dtype.element_ty)
    tl.store(a8_ptr + row * F + column, a8, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["unit_ptr", "scale_ptr", "amax_ptr"])
def _squared_relu8_backward_kernel(
    da_ptr,  # (T, F)
    a8_ptr,  # (T, F)
    dh8_ptr,  # (T, F), contiguous
    unit_ptr,  # (), fp32
    scale_ptr,  # (), fp32
    amax_ptr,  # (), int32: the bits of a float32
    T,
    F,
    stride_da,
    stride_a,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute dh = 2·√a·da and cast it."""
    row, column, mask = _place(T, F, ROWS, COLUMNS)
    da = tl.load(da_ptr + row * stride_da + column, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(a8_ptr + row * stride_a + column, mask=mask, other=0.0).to(tl.float32) * tl.load(unit_ptr)
    values = 2.0 * tl.sqrt_rn(a) * da
    note_largest(amax_ptr, values)
    dh8 = cast8(values, tl.load(scale_ptr), dh8_ptr.dtype.element_ty)
    tl.store(dh8_ptr + row * F + column, dh8, mask=mask)


def _cast(kernel: Any, inputs: tuple[Tensor, ...], scalars: tuple[Tensor, ...], amax: Tensor) -> Tensor:
    """Launch a kernel over blocks of its first input, and return its result in row order."""
    T, D = inputs[0].shape
    x8 = torch.empty(T, D, dtype=E4M3, device=inputs[0].device)
    if x8.numel():
        strides = [t.stride(0) for t in inputs]
        grid = cdiv(T, ROWS), cdiv(D, COLUMNS)
        launcher(kernel, grid)(
            *inputs, x8, *scalars, amax.view(torch.int32), T, D, *strides, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
        )
    return x8


def quantize8_triton(x: Tensor, scale: Tensor, amax: Tensor, row: bool, column: bool) -> tuple[Tensor, Tensor]:
    """Compute what `quantize8_reference` does."""
    x8 = _cast(_quantize8_kernel, (x,), (scale,), amax)
    none = x8.new_empty(0)
    return x8 if row else none, transpose8_triton(x8) if column else none


def squared_relu8_triton(h: Tensor, scale: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what `squared_relu8_reference` does."""
    a8 = _cast(_squared_relu8_kernel, (h,), (scale,), amax)
    return a8, transpose8_triton(a8)


def squared_relu8_backward_triton(
    da: Tensor, a8: Tensor, unit: Tensor, scale: Tensor, amax: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute what `squared_relu8_backward_reference` does."""
    dh8 = _cast(_squared_relu8_backward_kernel, (da, a8), (unit, scale), amax)
    return dh8, transpose8_triton(dh8)
