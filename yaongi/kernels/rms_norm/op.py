"""`rms_norm`, `gated_rms_norm` and `rms_norm8`: registration and the public functions."""

from typing import overload

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.common.dtypes import compute_dtype
from yaongi.kernels.fp8_quantize.op import SCALAR, refuses_gpu, refuses_sizes
from yaongi.kernels.fp8_quantize.reference import E4M3
from yaongi.kernels.rms_norm.reference import (
    gated_rms_norm_backward_reference,
    gated_rms_norm_reference,
    rms_norm8_backward_reference,
    rms_norm8_reference,
    rms_norm_backward_reference,
    rms_norm_reference,
)

Tensor = torch.Tensor


def _fake(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape), total


def _backward_fake(dy: Tensor, dsum: Tensor | None, u: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), weight.new_empty(weight.shape, dtype=compute_dtype(u, weight))


def _gated_fake(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    return x.new_empty(x.shape)


def _gated_backward_fake(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape, dtype=compute_dtype(x, weight))
    return x.new_empty(x.shape), z.new_empty(z.shape), dweight


def _norm8_fake(
    x: Tensor, weight: Tensor, eps: float, scale: Tensor, amax: Tensor, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    inverse_rms = x.new_empty(x.shape[:1], dtype=compute_dtype(x, weight))
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape if wide else (0,)), inverse_rms


def _norm8_backward_fake(
    dy: Tensor, extra: Tensor | None, x: Tensor, weight: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d8, d8t, y8t = (x.new_empty(shape, dtype=E4M3) for shape in (x.shape, x.mT.shape, x.mT.shape))
    return x.new_empty(x.shape), d8, d8t, y8t, weight.new_empty(weight.shape, dtype=compute_dtype(x, weight))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, residual, ctx.eps = inputs
    ctx.x_dtype, ctx.has_residual = x.dtype, residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy: Tensor | None, dsum: Tensor | None):  # type: ignore[no-untyped-def]
    u, weight = ctx.saved_tensors
    dsum = dsum if ctx.has_residual else None
    du, dweight = (dsum, None) if dy is None else _backward_op(dy, dsum, u, weight, ctx.eps)
    return None if du is None else du.to(ctx.x_dtype), dweight, du if ctx.has_residual else None, None


def _gated_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.eps, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _gated_backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
    return *_gated_backward_op(dy, *ctx.saved_tensors, ctx.eps, ctx.groups), None, None


def _value_check(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> None:
    check.finite("rms_norm", x=x, weight=weight, residual=residual)


def _gated_value_check(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> None:
    check.finite("gated_rms_norm", x=x, z=z, weight=weight)


LARGEST = 16384  # channels per group: a Triton program holds a whole group in its registers


def _triton_refuses(x: Tensor, *rest: object) -> str | None:
    return _refuses_size(x.shape[-1]) or backend.refuses_float64(x, *rest)


def _backward_triton_refuses(dy: Tensor, dsum: Tensor | None, u: Tensor, *rest: object) -> str | None:
    return _refuses_size(u.shape[-1]) or backend.refuses_float64(dy, u, *rest)


def _gated_triton_refuses(x: Tensor, *rest: object) -> str | None:
    return _refuses_size(x.shape[-1] // rest[-1]) or backend.refuses_float64(x, *rest)  # type: ignore[operator]


def _norm8_value_check(x: Tensor, weight: Tensor, eps: float, scale: Tensor, amax: Tensor, wide: bool) -> None:
    check.finite("rms_norm8", x=x, weight=weight, scale=scale)


def _norm8_triton_refuses(x: Tensor, *rest: object) -> str | None:
    return refuses_gpu(x.device) or _triton_refuses(x, *rest)


def _norm8_backward_triton_refuses(dy: Tensor, extra: Tensor | None, x: Tensor, *rest: object) -> str | None:
    return refuses_sizes(x) or _norm8_triton_refuses(x, dy, extra, *rest)


def _refuses_size(size: int) -> str | None:
    return f"it takes groups of up to {LARGEST} channels, got {size}" if size > LARGEST else None


_op = backend.define(
    "rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor y, Tensor sum)",
    reference=rms_norm_reference,
    fake=_fake,
    triton="yaongi.kernels.rms_norm.norm_kernels:rms_norm_triton",
    triton_refuses=_triton_refuses,
    value_check=_value_check,
)
_backward_op = backend.define(
    "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor u, Tensor weight, float eps) -> (Tensor du, Tensor dweight)",
    reference=rms_norm_backward_reference,
    fake=_backward_fake,
    triton="yaongi.kernels.rms_norm.norm_kernels:rms_norm_backward_triton",
    triton_refuses=_backward_triton_refuses,
)
_gated_op = backend.define(
    "gated_rms_norm(Tensor x, Tensor z, Tensor weight, float eps, int groups) -> Tensor",
    reference=gated_rms_norm_reference,
    fake=_gated_fake,
    triton="yaongi.kernels.rms_norm.norm_kernels:gated_rms_norm_triton",
    triton_refuses=_gated_triton_refuses,
    value_check=_gated_value_check,
)
_gated_backward_op = backend.define(
    "gated_rms_norm_backward(Tensor dy, Tensor x, Tensor z, Tensor weight, float eps, int groups) "
    "-> (Tensor dx, Tensor dz, Tensor dweight)",
    reference=gated_rms_norm_backward_reference,
    fake=_gated_backward_fake,
    triton="yaongi.kernels.rms_norm.norm_kernels:gated_rms_norm_backward_triton",
    triton_refuses=_gated_triton_refuses,
)
_norm8_op = backend.define(
    "rms_norm8(Tensor x, Tensor weight, float eps, Tensor scale, Tensor(a!) amax, bool wide) "
    "-> (Tensor y8, Tensor y, Tensor inverse_rms)",
    reference=rms_norm8_reference,
    fake=_norm8_fake,
    triton="yaongi.kernels.rms_norm.fp8_norm:rms_norm8_triton",
    triton_refuses=_norm8_triton_refuses,
    value_check=_norm8_value_check,
)
_norm8_backward_op = backend.define(
    "rms_norm8_backward(Tensor dy, Tensor? extra, Tensor x, Tensor weight, Tensor inverse_rms, Tensor scale_y, "
    "Tensor scale_d, Tensor(a!) amax) -> (Tensor dx, Tensor d8, Tensor d8t, Tensor y8t, Tensor dweight)",
    reference=rms_norm8_backward_reference,
    fake=_norm8_backward_fake,
    triton="yaongi.kernels.rms_norm.fp8_norm:rms_norm8_backward_triton",
    triton_refuses=_norm8_backward_triton_refuses,
)
backend.define_autograd("rms_norm", _backward, _setup_context)
backend.define_autograd("gated_rms_norm", _gated_backward, _gated_setup_context)
backend.define_no_autograd("rms_norm_backward")
backend.define_no_autograd("gated_rms_norm_backward")


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, residual: None = None) -> Tensor: ...


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, residual: Tensor) -> tuple[Tensor, Tensor]: ...


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Return (x + residual) / sqrt(mean((x + residual)²) + eps) · weight, with the mean over the last dimension.

    Args:
        x: (…, D), any float, unit stride along D.
        weight: (D), any float.
        eps: a positive number.
        residual: x's shape, any float, unit stride along D.

    Returns:
        y (…, D) in x's dtype, contiguous; with a residual (y, x + residual), with the sum in the residual's dtype:
        the sum is rounded before it is normalised.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape, stride or value.
    """
    args = check.Arguments("rms_norm")
    args.tensor("x", x, ("...", "D"), unit_stride=True)
    args.tensor("weight", weight, ("D",))
    if residual is not None:
        args.tensor("residual", residual, ("...", "D"), unit_stride=True)
        args.require(residual.shape == x.shape, "residual", f"{tuple(x.shape)} like x", tuple(residual.shape))
    _check_eps(args, eps)
    y, total = _op(x, weight, residual, eps)
    return y if residual is None else (y, total)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-5, groups: int = 1) -> Tensor:
    """Return x·silu(z) divided by its root mean square over each group of channels, times the weight.

    Args:
        x: (…, D), any float, unit stride along D.
        z: x's shape and dtype, unit stride along D: a slice of a wider projection is read in place.
        weight: (D), any float.
        eps: a positive number.
        groups: number of groups, of D / groups neighbouring channels each; divides D.

    Returns:
        y (…, D) in x's dtype, contiguous.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape, stride or value.
    """
    args = check.Arguments("gated_rms_norm")
    args.tensor("x", x, ("...", "D"), unit_stride=True)
    args.tensor("z", z, ("...", "D"), (x.dtype,), unit_stride=True)
    args.require(z.shape == x.shape, "z", f"{tuple(x.shape)} like x", tuple(z.shape))
    args.tensor("weight", weight, ("D",))
    _check_eps(args, eps)
    args.integer("groups", groups, 1)
    args.require(x.shape[-1] % groups == 0, "groups", f"a divisor of D = {x.shape[-1]}", groups)
    return _gated_op(x, z, weight, eps, groups)


def rms_norm8(
    x: Tensor, weight: Tensor, eps: float, scale: Tensor, amax: Tensor, *, wide: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return E4M3(y · scale) of y = x·r·weight with r = 1 / sqrt(mean(x²) + eps), never rounded in between.

    Args:
        x: (T, D), any float, unit stride along D.
        weight: (D), any float.
        eps: a positive number.
        scale, amax: as for `quantize8`, of y.
        wide: also return y.

    Returns:
        y8 (T, D), float8_e4m3fn; y (T, D) in x's dtype, or empty (0); and r (T), float32 (float64 for float64).

    Raises:
        TypeError: kind, dtype or device. ValueError: shape, stride or value.
    """
    args = check.Arguments("rms_norm8")
    args.tensor("x", x, ("T", "D"), unit_stride=True)
    args.tensor("weight", weight, ("D",))
    _check_eps(args, eps)
    args.tensor("scale", scale, (), SCALAR)
    args.tensor("amax", amax, (), SCALAR)
    args.boolean("wide", wide)
    return _norm8_op(x, weight, eps, scale, amax, wide)


def rms_norm8_backward(
    dy: Tensor,
    extra: Tensor | None,
    x: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    scale_y: Tensor,
    scale_d: Tensor,
    amax: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `rms_norm8`, dx in FP8 too, and the forward's y8 transposed.

    Args:
        dy: (T, D), any float, unit stride along D.
        extra: like dy, added to dx before it is rounded: the gradient past the norm; or None.
        x, weight: what the forward took.
        inverse_rms: (T), what the forward returned.
        scale_y: (), float32, the forward's scale.
        scale_d, amax: as for `quantize8`, of dx.

    Returns:
        dx (T, D) in x's dtype; d8 (T, D), d8t (D, T) and y8t (D, T), float8_e4m3fn; dweight (D), float32 (float64 for
        float64); all contiguous. The bytes of y8t are the forward's.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape or stride.
    """
    args = check.Arguments("rms_norm8_backward")
    args.tensor("dy", dy, ("T", "D"), unit_stride=True)
    if extra is not None:
        args.tensor("extra", extra, ("T", "D"), unit_stride=True)
    args.tensor("x", x, ("T", "D"), unit_stride=True)
    args.tensor("weight", weight, ("D",))
    args.tensor("inverse_rms", inverse_rms, ("T",), (torch.float32, torch.float64))
    for name, scalar in (("scale_y", scale_y), ("scale_d", scale_d), ("amax", amax)):
        args.tensor(name, scalar, (), SCALAR)
    return _norm8_backward_op(dy, extra, x, weight, inverse_rms, scale_y, scale_d, amax)


def _check_eps(args: check.Arguments, eps: float) -> None:
    args.number("eps", eps)
    args.require(eps > 0, "eps", "positive", eps)
