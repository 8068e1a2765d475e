"""`quantize8`, `transpose8`, `quantize_weight8` and `squared_relu8`: registration and the public functions."""

import functools

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.fp8_quantize.reference import (
    E4M3,
    quantize8_reference,
    quantize_weight8_reference,
    squared_relu8_backward_reference,
    squared_relu8_reference,
    transpose8_reference,
)

Tensor = torch.Tensor
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALAR = (torch.float32,)
LARGEST_BATCH = 65535  # the third dimension of a grid


def _fake(x: Tensor, scale: Tensor, amax: Tensor, row: bool, column: bool) -> tuple[Tensor, Tensor]:
    T, D = x.shape
    x8, none = x.new_empty(T, D, dtype=E4M3), x.new_empty(0, dtype=E4M3)
    return x8 if row else none, x.new_empty(D, T, dtype=E4M3) if column else none.clone()


def _transpose_fake(x8: Tensor) -> Tensor:
    return x8.new_empty(x8.mT.shape)


def _weight_fake(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    unit = w.new_empty((), dtype=torch.float32)
    return w.new_empty(w.shape, dtype=E4M3), w.new_empty(w.mT.shape, dtype=E4M3), unit


def _relu_fake(h: Tensor, scale: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape, dtype=E4M3), h.new_empty(h.mT.shape, dtype=E4M3)


def _relu_backward_fake(da: Tensor, a8: Tensor, unit: Tensor, scale: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    return _relu_fake(da, scale, amax)


@functools.cache
def refuses_gpu(device: torch.device) -> str | None:
    """Return why a GPU can't cast to FP8, or None if it can."""
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 9) else f"it needs compute capability 8.9 or newer, got {capability}"


def refuses_sizes(t: Tensor) -> str | None:
    """Return why the fast transpose can't take a tensor, or None if it can."""
    *batch, T, D = t.shape
    if T % 16 or D % 16:
        return f"it takes matrices with multiples of 16 rows and columns, got {T} and {D}"
    return f"it takes up to {LARGEST_BATCH} matrices, got {batch[0]}" if batch and batch[0] > LARGEST_BATCH else None


def _triton_refuses(x: Tensor, scale: Tensor, amax: Tensor, row: bool, column: bool) -> str | None:
    return refuses_gpu(x.device) or (refuses_sizes(x) if column else None) or backend.refuses_float64(x)


def _transpose_triton_refuses(x8: Tensor) -> str | None:
    return refuses_sizes(x8)


def _cast_triton_refuses(x: Tensor, *rest: Tensor) -> str | None:
    return refuses_gpu(x.device) or refuses_sizes(x) or backend.refuses_float64(x, *rest)


def _value_check(x: Tensor, scale: Tensor, *rest: object) -> None:
    check.finite("quantize8", x=x, scale=scale)


def _weight_value_check(w: Tensor) -> None:
    check.finite("quantize_weight8", w=w)


def _relu_value_check(h: Tensor, scale: Tensor, amax: Tensor) -> None:
    check.finite("squared_relu8", h=h, scale=scale)


def _relu_backward_value_check(da: Tensor, a8: Tensor, unit: Tensor, scale: Tensor, amax: Tensor) -> None:
    check.finite("squared_relu8_backward", da=da, a8=a8, unit=unit, scale=scale)


_op = backend.define(
    "quantize8(Tensor x, Tensor scale, Tensor(a!) amax, bool row, bool column) -> (Tensor x8, Tensor x8t)",
    reference=quantize8_reference,
    fake=_fake,
    triton="yaongi.kernels.fp8_quantize.row_casts:quantize8_triton",
    triton_refuses=_triton_refuses,
    value_check=_value_check,
)
_transpose_op = backend.define(
    "transpose8(Tensor x8) -> Tensor",
    reference=transpose8_reference,
    fake=_transpose_fake,
    triton="yaongi.kernels.fp8_quantize.byte_transpose:transpose8_triton",
    triton_refuses=_transpose_triton_refuses,
)
_weight_op = backend.define(
    "quantize_weight8(Tensor w) -> (Tensor w8, Tensor w8t, Tensor unit)",
    reference=quantize_weight8_reference,
    fake=_weight_fake,
    triton="yaongi.kernels.fp8_quantize.weight_casts:quantize_weight8_triton",
    triton_refuses=_cast_triton_refuses,
    value_check=_weight_value_check,
)
_relu_op = backend.define(
    "squared_relu8(Tensor h, Tensor scale, Tensor(a!) amax) -> (Tensor a8, Tensor a8t)",
    reference=squared_relu8_reference,
    fake=_relu_fake,
    triton="yaongi.kernels.fp8_quantize.row_casts:squared_relu8_triton",
    triton_refuses=_cast_triton_refuses,
    value_check=_relu_value_check,
)
_relu_backward_op = backend.define(
    "squared_relu8_backward(Tensor da, Tensor a8, Tensor unit, Tensor scale, Tensor(a!) amax) "
    "-> (Tensor dh8, Tensor dh8t)",
    reference=squared_relu8_backward_reference,
    fake=_relu_backward_fake,
    triton="yaongi.kernels.fp8_quantize.row_casts:squared_relu8_backward_triton",
    triton_refuses=_cast_triton_refuses,
    value_check=_relu_backward_value_check,
)
backend.define_no_autograd("transpose8")
backend.define_no_autograd("quantize_weight8")


def quantize8(
    x: Tensor, scale: Tensor, amax: Tensor, *, row: bool = True, column: bool = False
) -> tuple[Tensor, Tensor]:
    """Return E4M3(x · scale), saturated at ±448, in row order and transposed.

    Args:
        x: (T, D), any float, unit stride along D.
        scale: (), float32, finite and positive; a power of two makes the cast of a transpose the transpose of the cast.
        amax: (), float32, in place: becomes the largest of itself and |x|; NaN and infinity win.
        row, column: which of the results are wanted.

    Returns:
        x8 (T, D) and x8t (D, T), float8_e4m3fn, contiguous; empty (0) what isn't wanted.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape, stride, or neither order is wanted.
    """
    args = check.Arguments("quantize8")
    args.tensor("x", x, ("T", "D"), unit_stride=True)
    _check_scale(args, scale, amax)
    args.boolean("row", row)
    args.boolean("column", column)
    args.require(row or column, "row", "True where column is False", row)
    return _op(x, scale, amax, row, column)


def transpose8(x8: Tensor) -> Tensor:
    """Return a matrix of 8-bit floats with its dimensions swapped in memory: the same bytes.

    Args:
        x8: (T, D) or (E, T, D), float8_e4m3fn or float8_e5m2, unit stride along D.

    Returns:
        (D, T) or (E, D, T), contiguous.

    Raises:
        TypeError: kind or dtype. ValueError: shape or stride.
    """
    args = check.Arguments("transpose8")
    args.tensor("x8", x8, ("...", "T", "D"), FLOAT8, unit_stride=True)
    args.require(x8.dim() <= 3, "x8", "(T, D) or (E, T, D)", tuple(x8.shape))
    return _transpose_op(x8)


def quantize_weight8(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return E4M3(w · s) with s = 2^⌊log2(448 / max|w|)⌋, its transpose, and the unit 1/s.

    Args:
        w: (R, C) or (E, R, C), any float, unit stride along C; one scale for all of it.

    Returns:
        w8 of w's shape and w8t (C, R) or (E, C, R), float8_e4m3fn, contiguous; unit (), float32. The unit is 1 where w
        is all zeros, and NaN, like every code, where w isn't finite.

    Raises:
        TypeError: kind or dtype. ValueError: shape or stride.
    """
    args = check.Arguments("quantize_weight8")
    args.tensor("w", w, ("...", "R", "C"), unit_stride=True)
    args.require(w.dim() <= 3, "w", "(R, C) or (E, R, C)", tuple(w.shape))
    return _weight_op(w)


def squared_relu8(h: Tensor, scale: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Return E4M3(relu(h)² · scale), saturated, in row order and transposed.

    Args:
        h: (T, F), any float, unit stride along F.
        scale, amax: as for `quantize8`, of relu(h)².

    Returns:
        a8 (T, F) and a8t (F, T), float8_e4m3fn, contiguous.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape or stride.
    """
    args = check.Arguments("squared_relu8")
    args.tensor("h", h, ("T", "F"), unit_stride=True)
    _check_scale(args, scale, amax)
    return _relu_op(h, scale, amax)


def squared_relu8_backward(da: Tensor, a8: Tensor, unit: Tensor, scale: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Return E4M3(dh · scale), saturated, in both orders, for the gradient dh = 2·√a·da of a = relu(h)².

    Args:
        da: (T, F), any float, unit stride along F.
        a8: (T, F), float8_e4m3fn, what `squared_relu8` returned, unit stride along F.
        unit: (), float32, one over the scale of a8.
        scale, amax: as for `quantize8`, of dh.

    Returns:
        dh8 (T, F) and dh8t (F, T), float8_e4m3fn, contiguous.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape or stride.
    """
    args = check.Arguments("squared_relu8_backward")
    args.tensor("da", da, ("T", "F"), unit_stride=True)
    args.tensor("a8", a8, ("T", "F"), (E4M3,), unit_stride=True)
    args.tensor("unit", unit, (), SCALAR)
    _check_scale(args, scale, amax)
    return _relu_backward_op(da, a8, unit, scale, amax)


def _check_scale(args: check.Arguments, scale: Tensor, amax: Tensor) -> None:
    args.tensor("scale", scale, (), SCALAR)
    args.tensor("amax", amax, (), SCALAR)
