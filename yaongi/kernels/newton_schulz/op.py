"""`newton_schulz` and `teon_update`: the coefficients, registration, and the public functions."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.newton_schulz.reference import newton_schulz_reference, teon_update_reference

Tensor = torch.Tensor
GPU = "yaongi.kernels.newton_schulz.passes"
TEON_ON_GPU = "yaongi.kernels.newton_schulz.teon"
Coefficients = Sequence[tuple[float, float, float]]  # (a, b, c) of each step: σ ← aσ + bσ³ + cσ⁵
SAFETY = 1.05  # the steps hold for σ ≤ 1 and are evaluated at σ/SAFETY, in case rounding puts σ above 1
POLAR_EXPRESS: Coefficients = tuple(
    (a / SAFETY, b / SAFETY**3, c / SAFETY**5)
    for a, b, c in (
        (8.28721, -23.59589, 17.30039),
        (4.10706, -2.94785, 0.54484),
        (3.94869, -2.90890, 0.55182),
        (3.31842, -2.48849, 0.51005),
        (2.30065, -1.66890, 0.41881),
    )
)


def _fake(x: Tensor, coefficients: list[float], form: str) -> Tensor:
    return x.new_empty(x.shape)


def _value_check(x: Tensor, coefficients: list[float], form: str) -> None:
    check.finite("newton_schulz", x=x)


def _triton_refuses(x: Tensor, coefficients: list[float], form: str) -> str | None:
    return _refuses_tensors([x], x.shape[-2] * x.shape[-1])


def _cuda_refuses(x: Tensor, coefficients: list[float], form: str) -> str | None:
    return backend.unavailable("triton") or _triton_refuses(x, coefficients, form)


def _refuses_tensors(tensors: list[Tensor], elements: int) -> str | None:
    """Return why the kernels around the products can't take these tensors, or matrices of so many elements."""
    if any(t.dtype == torch.float64 for t in tensors):
        return "it takes no float64"
    return "it takes matrices of less than 2³¹ elements" if elements >= 2**31 else None


_op = backend.define(
    "newton_schulz(Tensor x, float[] coefficients, str form) -> Tensor",
    reference=newton_schulz_reference,
    fake=_fake,
    triton=f"{GPU}:newton_schulz_triton",
    triton_refuses=_triton_refuses,
    cuda=f"{GPU}:newton_schulz_cuda",
    cuda_refuses=_cuda_refuses,
    value_check=_value_check,
)
backend.define_no_autograd("newton_schulz")


def _teon_fake(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    masters: list[Tensor],
    stack: int,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    coefficients: list[float],
    active: Tensor | None = None,
) -> None:
    return None


def _teon_value_check(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], masters: list[Tensor], *_: object
) -> None:
    for name, tensors in (("params", params), ("grads", grads), ("momenta", momenta), ("masters", masters)):
        check.finite("teon_update", **{f"{name}[{i}]": t for i, t in enumerate(tensors)})


def _teon_triton_refuses(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], masters: list[Tensor], stack: int, *_: object
) -> str | None:
    elements = stack * params[0].shape[-2] * params[0].shape[-1]
    return _refuses_tensors([params[0], grads[0], momenta[0], *masters[:1]], elements)


def _teon_cuda_refuses(*args: Any) -> str | None:
    return backend.unavailable("triton") or _teon_triton_refuses(*args)


_teon_op = backend.define(
    "teon_update(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] masters, int stack, float lr,"
    " float momentum, bool nesterov, float weight_decay, float[] coefficients, Tensor? active=None) -> ()",
    reference=teon_update_reference,
    fake=_teon_fake,
    triton=f"{TEON_ON_GPU}:teon_update_triton",
    triton_refuses=_teon_triton_refuses,
    cuda=f"{TEON_ON_GPU}:teon_update_cuda",
    cuda_refuses=_teon_cuda_refuses,
    value_check=_teon_value_check,
)


def _check_coefficients(args: check.Arguments, coefficients: object) -> list[float]:
    """Check the coefficients and flatten their triples; the default, POLAR_EXPRESS, needs no check."""
    if coefficients is POLAR_EXPRESS:
        return [value for triple in POLAR_EXPRESS for value in triple]
    if not isinstance(coefficients, (list, tuple)):
        raise TypeError(f"{args.op}: coefficients must be a list of (a, b, c), got {type(coefficients).__name__}")
    args.require(len(coefficients) > 0, "coefficients", "one (a, b, c) a step and at least one step", "none")
    flat: list[float] = []
    for i, step in enumerate(coefficients):
        fits = isinstance(step, (list, tuple)) and len(step) == 3
        args.require(fits, f"coefficients[{i}]", "three numbers (a, b, c)", step)
        for letter, value in zip("abc", step, strict=True):
            args.number(f"coefficients[{i}].{letter}", value)
            flat.append(float(value))
    return flat


def _refuse_grad(args: check.Arguments, name: str, value: Tensor) -> None:
    outside = not (value.requires_grad and torch.is_grad_enabled())
    args.require(outside, name, "used under torch.no_grad() or detached (the op has no gradient)", "requires_grad=True")


def newton_schulz(
    x: Tensor, *, coefficients: Coefficients = POLAR_EXPRESS, form: Literal["gram", "standard"] = "gram"
) -> Tensor:
    """Orthogonalise matrices: U·p(Σ)·Vᵀ for X/‖X‖_F = U·Σ·Vᵀ, where the odd polynomial p takes Σ close to 1.

    The op is for optimizers: it has no gradient, and refuses an x that requires one while gradients are recorded. A
    zero matrix gives zeros; a matrix with a NaN or an infinity gives NaN, without effect on the rest of the batch.

    Args:
        x: (…, m, n), float16, bfloat16, float32 or float64, any layout, tall or wide.
        coefficients: (a, b, c) of each step.
        form: "gram" iterates on the short side's Gram matrix, which is cheaper for m ≠ n; "standard" iterates on X.

    Returns:
        The result, x's shape and dtype, contiguous. The reference computes in x's dtype but at least float32.

    Raises:
        TypeError: dtype or kind. ValueError: shape or value, or an x that requires a gradient.
    """
    args = check.Arguments("newton_schulz")
    args.tensor("x", x, ("...", "m", "n"))
    _refuse_grad(args, "x", x)
    args.choice("form", form, ("gram", "standard"))
    return _op(x, _check_coefficients(args, coefficients), form)


def _check_tensors(
    args: check.Arguments,
    name: str,
    values: object,
    count: int,
    dims: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...] = check.FLOAT_DTYPES,
    *,
    written: bool = True,
) -> list[Tensor]:
    """Check a list of tensors of one shape and dtype; if `written`, they must be contiguous."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{args.op}: {name} must be a list of tensors, got {type(values).__name__}")
    args.require(len(values) == count, name, f"{count} tensors like params", f"{len(values)}")
    for i, value in enumerate(values):
        if i and _is_like(value, values[0], written):
            continue  # a step has hundreds of tensors, and the full check costs the host 4 µs each
        args.tensor(f"{name}[{i}]", value, dims, dtypes if i == 0 else (values[0].dtype,))
        if written:
            _refuse_grad(args, f"{name}[{i}]", value)
            args.require(value.is_contiguous(), f"{name}[{i}]", "contiguous", f"strides {value.stride()}")
    return list(values)


def _is_like(value: object, first: Tensor, written: bool) -> bool:
    """Return whether a tensor has the properties of the first of its list, which has been checked."""
    if not isinstance(value, torch.Tensor):
        return False
    alike = value.dtype == first.dtype and value.shape == first.shape and value.device == first.device
    return alike and (not written or (value.is_contiguous() and not value.requires_grad))


def _check_rates(args: check.Arguments, **rates: float) -> None:
    for name, value in rates.items():
        args.number(name, value)
        args.require(value >= 0, name, "0 or more", value)
    args.require(rates["momentum"] < 1, "momentum", "less than 1", rates["momentum"])


def teon_update(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    masters: list[Tensor] | None = None,
    *,
    stack: int = 1,
    lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    coefficients: Coefficients = POLAR_EXPRESS,
    active: Tensor | None = None,
) -> None:
    """Take one step of Teon (Muon for stack = 1) on matrices of one shape, in place.

    M ← μM + G and U = G + μM (Nesterov) or M. Each `stack` consecutive entries are orthogonalised jointly,
    [O₁|…|O_K] = newton_schulz([U₁|…|U_K]); then W_k ← (1 − lr·λ)·W_k − lr·sqrt(m/n)·O_k. Nothing is written unless
    every argument is valid. Call it under torch.no_grad().

    Args:
        params: tensors (m, n), or (E, m, n) as E independent matrices; of one dtype, contiguous.
        grads: one per parameter, of its shape; any float dtype and layout.
        momenta: one momentum buffer per parameter, of its shape; any float dtype, contiguous.
        masters: one master weight per parameter, of its shape, float32 (float64 for params in float64), contiguous: it
            takes the update, and the parameter becomes its cast. If None, the parameters take the update.
        stack: K, divides len(params).
        lr, weight_decay: ≥ 0. momentum: ≥ 0 and < 1. nesterov: a bool.
        coefficients: (a, b, c) of each Newton-Schulz step.
        active: (S, E) bool for S = len(params) / stack and parameters (E, m, n), (S) for (m, n): what to update. Of a
            joint matrix that is not active, parameters, momenta and masters stay as they are. None: all are.

    Raises:
        TypeError: dtype, device or kind. ValueError: length, shape, stride or value.
    """
    args = check.Arguments("teon_update")
    if not isinstance(params, (list, tuple)):
        raise TypeError(f"teon_update: params must be a list of tensors, got {type(params).__name__}")
    count = len(params)
    dims = ("E", "m", "n") if count and getattr(params[0], "ndim", 2) == 3 else ("m", "n")
    params = _check_tensors(args, "params", params, count, dims)
    grads = _check_tensors(args, "grads", grads, count, dims, written=False)
    momenta = _check_tensors(args, "momenta", momenta, count, dims)
    if masters is not None:
        wanted = torch.float64 if count and params[0].dtype == torch.float64 else torch.float32
        masters = _check_tensors(args, "masters", masters, count, dims, (wanted,))
    written = [*params, *momenta, *(masters or [])]
    distinct = len({id(t) for t in written}) == len(written)
    args.require(distinct, "params", "distinct from one another and from momenta and masters", "one tensor twice")
    args.integer("stack", stack, 1)
    args.require(count % stack == 0, "params", f"a multiple of stack = {stack} tensors", count)
    _check_rates(args, lr=lr, momentum=momentum, weight_decay=weight_decay)
    args.boolean("nesterov", nesterov)
    flat = _check_coefficients(args, coefficients)
    args.sizes["S"] = count // stack
    args.optional("active", active, ("S", *dims[:-2]), (torch.bool,))
    if count:
        _teon_op(params, grads, momenta, masters or [], stack, lr, momentum, nesterov, weight_decay, flat, active)
