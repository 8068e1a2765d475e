"""`causal_conv1d` and `causal_conv1d_step`: registration and the public functions."""

from typing import Literal, overload

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.causal_conv1d.reference import (
    causal_conv1d_backward_reference,
    causal_conv1d_reference,
    causal_conv1d_step_reference,
)
from yaongi.kernels.common.dtypes import compute_dtype

Tensor = torch.Tensor
Activation = Literal["silu"] | None


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    final_shape = (batch, channels, weight.shape[1] - 1) if return_final_state else (0,)
    return x.new_empty(x.shape), x.new_empty(final_shape)


def _backward_fake(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = compute_dtype(x, weight)
    dweight = weight.new_empty(weight.shape, dtype=wide)
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape, dtype=wide)
    dinitial_state = x.new_empty(0 if initial_state is None else initial_state.shape)
    return x.new_empty(x.shape), dweight, dbias, dinitial_state


def _step_fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.activation, ctx.return_final_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy: Tensor | None, dfinal_state: Tensor | None):  # type: ignore[no-untyped-def]
    x, weight, bias, document_ids, initial_state = ctx.saved_tensors
    dy = x.new_zeros(x.shape) if dy is None else dy
    dfinal_state = dfinal_state if ctx.return_final_state else None
    dx, dweight, dbias, dinitial_state = _backward_op(
        dy, dfinal_state, x, weight, bias, document_ids, initial_state, ctx.activation
    )
    dbias, dinitial_state = (None if t is None else d for t, d in ((bias, dbias), (initial_state, dinitial_state)))
    return dx, dweight, dbias, None, dinitial_state, None, None


def _value_check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
    return_final_state: bool,
) -> None:
    check.finite("causal_conv1d", x=x, weight=weight, bias=bias, initial_state=initial_state)
    check.documents("causal_conv1d", document_ids)


def _step_value_check(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> None:
    check.finite("causal_conv1d_step", x=x, state=state, weight=weight, bias=bias)


def _triton_refuses(x: Tensor, weight: Tensor, *rest: object) -> str | None:
    if weight.shape[1] not in (2, 3, 4):
        return f"it takes W = 2, 3 or 4, got {weight.shape[1]}"
    return backend.refuses_float64(x, weight, *rest)


def _step_triton_refuses(x: Tensor, state: Tensor, weight: Tensor, *rest: object) -> str | None:
    return _triton_refuses(x, weight, *rest)


def _backward_triton_refuses(dy: Tensor, dfinal_state: Tensor | None, *inputs: Tensor) -> str | None:
    return _triton_refuses(*inputs)


_op = backend.define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? document_ids, Tensor? initial_state, "
    "str? activation, bool return_final_state) -> (Tensor y, Tensor final_state)",
    reference=causal_conv1d_reference,
    fake=_fake,
    triton="yaongi.kernels.causal_conv1d.conv_forward:causal_conv1d_triton",
    triton_refuses=_triton_refuses,
    value_check=_value_check,
)
_backward_op = backend.define(
    "causal_conv1d_backward(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? document_ids, Tensor? initial_state, str? activation) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)",
    reference=causal_conv1d_backward_reference,
    fake=_backward_fake,
    triton="yaongi.kernels.causal_conv1d.conv_backward:causal_conv1d_backward_triton",
    triton_refuses=_backward_triton_refuses,
)
_step_op = backend.define(
    "causal_conv1d_step(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, str? activation, Tensor? steps) "
    "-> Tensor",
    reference=causal_conv1d_step_reference,
    fake=_step_fake,
    triton="yaongi.kernels.causal_conv1d.step:causal_conv1d_step_triton",
    triton_refuses=_step_triton_refuses,
    value_check=_step_value_check,
)
backend.define_autograd("causal_conv1d", _backward, _setup_context)
backend.define_no_autograd("causal_conv1d_backward")


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "silu",
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "silu",
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "silu",
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Apply a depthwise causal convolution over the last W inputs of each channel, then the activation.

    No tap crosses a document boundary; the initial state belongs to the first document of its row.

    Args:
        x: (B, L, C), any float, L ≥ 1, unit stride along C: a slice of a wider projection is read in place.
        weight: (C, W), any float, W ≥ 1; the last tap multiplies the newest input.
        bias: (C), weight's dtype.
        activation: "silu" or None.
        document_ids: (B, L), int32, non-decreasing along L.
        initial_state: (B, C, W − 1), x's dtype, the inputs before the sequence; zeros when None.
        return_final_state: also return the last W − 1 inputs of the last document, zero-padded if it is shorter.

    Returns:
        y (B, L, C) in x's dtype, contiguous; with return_final_state (y, final state (B, C, W − 1) in x's dtype).

    Raises:
        TypeError: kind, dtype or device. ValueError: shape, stride or value.
    """
    args = check.Arguments("causal_conv1d")
    args.tensor("x", x, ("B", "L", "C"), unit_stride=True)
    args.require(x.shape[1] >= 1, "x", "(B, L, C) with L >= 1", tuple(x.shape))
    _check_filter(args, x, weight, bias, activation)
    args.optional("document_ids", document_ids, ("B", "L"), (torch.int32,))
    args.optional("initial_state", initial_state, ("B", "C", "W-1"), (x.dtype,))
    args.boolean("return_final_state", return_final_state)
    y, final_state = _op(x, weight, bias, document_ids, initial_state, activation, return_final_state)
    return (y, final_state) if return_final_state else y


@torch.no_grad()
def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "silu",
    steps: Tensor | None = None,
) -> Tensor:
    """Return the next output of `causal_conv1d`, given the last inputs in `state`; it has no gradient.

    A dilated convolution is P plain ones that take turns: with `steps`, row b continues number steps_b % P.

    Args:
        x: (B, C), any float, unit stride along C.
        state: (B, C, W − 1), x's dtype, the last inputs, oldest first; with `steps` (B, P, C, W − 1), P ≥ 1. Updated in
            place.
        weight: (C, W), any float.
        bias: (C), weight's dtype.
        activation: "silu" or None.
        steps: (B,) int64, counted from the state's first convolution.

    Returns:
        y (B, C) in x's dtype, contiguous.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape, stride or value.
    """
    args = check.Arguments("causal_conv1d_step")
    args.tensor("x", x, ("B", "C"), unit_stride=True)
    _check_filter(args, x, weight, bias, activation)
    dims = ("B", "C", "W-1") if steps is None else ("B", "P", "C", "W-1")
    args.tensor("state", state, dims, (x.dtype,), written=True)
    args.require(steps is None or state.shape[1] >= 1, "state", "(B, P, C, W-1) with P >= 1", tuple(state.shape))
    args.optional("steps", steps, ("B",), (torch.int64,))
    return _step_op(x, state, weight, bias, activation, steps)


def _check_filter(args: check.Arguments, x: Tensor, weight: Tensor, bias: Tensor | None, activation: object) -> None:
    args.tensor("weight", weight, ("C", "W"))
    args.require(weight.shape[1] >= 1, "weight", "(C, W) with W >= 1", tuple(weight.shape))
    args.optional("bias", bias, ("C",), (weight.dtype,))
    args.choice("activation", activation, ("silu", None))
    args.sizes["W-1"] = weight.shape[1] - 1
