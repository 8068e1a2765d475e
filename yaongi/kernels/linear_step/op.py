"""`linear_step` and `linear_steps`: registration and the public functions."""

from collections.abc import Sequence
from typing import Literal

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.linear_step.reference import linear_step_reference, linear_steps_reference

Tensor = torch.Tensor
Activation = Literal["squared_relu"] | None
MOST_ROWS = 16  # beyond, a library's products are as fast


def _fake(
    x: Tensor, weight: Tensor, addend: Tensor | None, activation: str | None, wide: bool, settled: bool
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32) if wide else x.dtype
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


def _value_check(x: Tensor, weight: Tensor, addend: Tensor | None, *rest: object) -> None:
    check.finite("linear_step", x=x, weight=weight, addend=addend)


def _fakes(x: Tensor, weights: list[Tensor], settled: bool) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


def _value_checks(x: Tensor, weights: list[Tensor], settled: bool) -> None:
    named = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    check.finite("linear_steps", x=x, **named)


def _triton_refuses(x: Tensor, *rest: object) -> str | None:
    if x.dtype not in check.HALF_DTYPES:
        return f"it takes float16 and bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    if x.shape[0] > MOST_ROWS:
        return f"it takes up to {MOST_ROWS} rows, got {x.shape[0]}"
    return None


_op = backend.define(
    "linear_step(Tensor x, Tensor weight, Tensor? addend, str? activation, bool wide, bool settled) -> Tensor",
    reference=linear_step_reference,
    fake=_fake,
    triton="yaongi.kernels.linear_step.few_rows_linear:linear_step_triton",
    triton_refuses=_triton_refuses,
    value_check=_value_check,
)
_ops = backend.define(
    "linear_steps(Tensor x, Tensor[] weights, bool settled) -> Tensor[]",
    reference=linear_steps_reference,
    fake=_fakes,
    triton="yaongi.kernels.linear_step.few_rows_linear:linear_steps_triton",
    triton_refuses=_triton_refuses,
    value_check=_value_checks,
)


@torch.no_grad()
def linear_step(
    x: Tensor,
    weight: Tensor,
    addend: Tensor | None = None,
    *,
    activation: Activation = None,
    wide: bool = False,
    settled: bool = False,
) -> Tensor:
    """Return activation(x·weightᵀ) + addend for few rows, as in a step of generation; it has no gradient.

    Args:
        x: (T, D), any float.
        weight: (N, D), x's dtype.
        addend: (T, N), x's dtype.
        activation: "squared_relu", relu(·)², or None.
        wide: return the sums as they are, in at least float32.
        settled: no work that is still under way on the GPU writes the weight, so that it may be read before that work
            has ended.

    Returns:
        y (T, N) in x's dtype, contiguous; summed in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape or value.
    """
    args = check.Arguments("linear_step")
    args.tensor("x", x, ("T", "D"))
    args.tensor("weight", weight, ("N", "D"), (x.dtype,))
    args.optional("addend", addend, ("T", "N"), (x.dtype,))
    args.choice("activation", activation, ("squared_relu", None))
    args.boolean("wide", wide)
    args.boolean("settled", settled)
    return _op(x, weight, addend, activation, wide, settled)


@torch.no_grad()
def linear_steps(x: Tensor, weights: Sequence[Tensor], *, settled: bool = False) -> tuple[Tensor, ...]:
    """Return x·weightᵀ for each of several weights, for one row in one launch for three; it has no gradient.

    Args:
        x: (T, D), any float.
        weights: (N, D) each, with an N of its own; x's dtype.
        settled: as in `linear_step`, of all of them.

    Returns:
        (T, N) each, as from `linear_step`.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape or value.
    """
    args = check.Arguments("linear_steps")
    args.tensor("x", x, ("T", "D"))
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"linear_steps: weights must be a list of tensors, got {type(weights).__name__}")
    for i, weight in enumerate(weights):
        args.tensor(f"weights[{i}]", weight, (f"N{i}", "D"), (x.dtype,))
    args.boolean("settled", settled)
    return tuple(_ops(x, list(weights), settled))
