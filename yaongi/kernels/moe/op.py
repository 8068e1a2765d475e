"""`moe_route` and `moe`: registration and the public functions."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from yaongi.kernels import backend, check
from yaongi.kernels.moe.reference import (
    moe_backward_accumulate_reference,
    moe_backward_reference,
    moe_reference,
    moe_route_backward_reference,
    moe_route_reference,
)

Tensor = torch.Tensor


def _route_fake(logits: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    T, E = logits.shape
    int32 = torch.int32
    return logits.new_empty(T, top_k, dtype=int32), logits.new_empty(T, top_k), logits.new_empty(E, dtype=int32)


def _route_backward_fake(dweights: Tensor, logits: Tensor, expert_ids: Tensor, scale: float) -> Tensor:
    return logits.new_empty(logits.shape)


def _route_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, _, _, ctx.scale = inputs
    expert_ids, _, load = output
    ctx.mark_non_differentiable(expert_ids, load)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, expert_ids)


def _route_backward(ctx, _dids, dweights: Tensor | None, _dload):  # type: ignore[no-untyped-def]
    dlogits = None
    if dweights is not None and ctx.needs_input_grad[0]:
        logits, expert_ids = ctx.saved_tensors
        dlogits = _route_backward_op(dweights, logits, expert_ids, ctx.scale)
    return dlogits, None, None, None


def _route_value_check(logits: Tensor, bias: Tensor, top_k: int, scale: float) -> None:
    check.finite("moe_route", logits=logits, bias=bias)


_route_op = backend.define(
    "moe_route(Tensor logits, Tensor bias, int top_k, float scale) -> (Tensor, Tensor, Tensor)",
    reference=moe_route_reference,
    fake=_route_fake,
    triton="yaongi.kernels.moe.routing:moe_route_triton",
    value_check=_route_value_check,
)
_route_backward_op = backend.define(
    "moe_route_backward(Tensor dweights, Tensor logits, Tensor expert_ids, float scale) -> Tensor",
    reference=moe_route_backward_reference,
    fake=_route_backward_fake,
    triton="yaongi.kernels.moe.routing:moe_route_backward_triton",
)
backend.define_autograd("moe_route", _route_backward, _route_setup_context)
backend.define_no_autograd("moe_route_backward")


def _fake(x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(expert_ids.shape[0] * expert_ids.shape[1], w_up.shape[1])


def _backward_fake(
    dy: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, expert_weights: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dw_up, dw_down, dweights = (t.new_empty(t.shape) for t in (x, w_up, w_down, expert_weights))
    return dx, dw_up, dw_down, dweights


def _accumulate_fake(dy: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    expert_weights = rest[3]
    return x.new_empty(x.shape), expert_weights.new_empty(expert_weights.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, a = output
    ctx.mark_non_differentiable(a)
    ctx.set_materialize_grads(False)  # else autograd would allocate zeros for the gradient of A
    ctx.save_for_backward(*inputs, a)


def _backward(ctx, dy: Tensor | None, _da):  # type: ignore[no-untyped-def]
    if dy is None:
        return None, None, None, None, None
    dx, dw_up, dw_down, dweights = _backward_op(dy, *ctx.saved_tensors)
    grads = (dx, dw_up, dw_down, None, dweights)
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True))


def _value_check(x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> None:
    check.finite("moe", x=x, w_up=w_up, w_down=w_down, expert_weights=expert_weights)
    check_ids("moe", expert_ids, w_up.shape[0])


def check_ids(op: str, expert_ids: Tensor, experts: int) -> None:
    """Refuse an id of no expert but −1, and a token with one expert twice. For checked mode only: it synchronises."""
    bad = expert_ids[(expert_ids < -1) | (expert_ids >= experts)]
    if bad.numel():
        raise ValueError(f"{op}: expert_ids must be 0 to {experts - 1} (E - 1), or -1 for none, got {int(bad[0])}")
    ranked = expert_ids.sort(dim=-1).values
    repeats = ((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).nonzero()
    if repeats.numel():
        token, place = repeats[0].tolist()
        repeated = int(ranked[token, place])
        raise ValueError(f"{op}: expert_ids must name an expert once per token, got {repeated} twice in token {token}")


def _triton_refuses(x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, *rest: Tensor) -> str | None:
    _, F, D = w_up.shape
    if not expert_ids.shape[1]:
        return "it takes K of 1 or more, got 0"
    if x.dtype not in check.HALF_DTYPES:
        return f"it takes float16 and bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    if D % 16 or F % 16:
        return f"it takes D and F that are multiples of 16, got D = {D}, F = {F}"
    return None


def _backward_triton_refuses(dy: Tensor, *inputs: Tensor) -> str | None:
    return _triton_refuses(*inputs)


def _accumulate_cuda_refuses(dy: Tensor, *inputs: Tensor) -> str | None:
    """Only the weights' gradients are in CUDA; the rest is Triton's."""
    return backend.unavailable("triton", dy.get_device()) or _triton_refuses(*inputs)


_op = backend.define(
    "moe(Tensor x, Tensor w_up, Tensor w_down, Tensor expert_ids, Tensor expert_weights) -> (Tensor y, Tensor a)",
    reference=moe_reference,
    fake=_fake,
    triton="yaongi.kernels.moe.experts_forward:moe_triton",
    triton_refuses=_triton_refuses,
    value_check=_value_check,
)
_backward_op = backend.define(
    "moe_backward(Tensor dy, Tensor x, Tensor w_up, Tensor w_down, Tensor expert_ids, Tensor expert_weights, Tensor a)"
    " -> (Tensor dx, Tensor dw_up, Tensor dw_down, Tensor dexpert_weights)",
    reference=moe_backward_reference,
    fake=_backward_fake,
    triton="yaongi.kernels.moe.experts_backward:moe_backward_triton",
    triton_refuses=_backward_triton_refuses,
)
_accumulate_op = backend.define(
    "moe_backward_accumulate(Tensor dy, Tensor x, Tensor w_up, Tensor w_down, Tensor expert_ids, Tensor expert_weights,"
    " Tensor a, Tensor(a!) dw_up, Tensor(b!) dw_down) -> (Tensor dx, Tensor dexpert_weights)",
    reference=moe_backward_accumulate_reference,
    fake=_accumulate_fake,
    triton="yaongi.kernels.moe.experts_backward:moe_backward_accumulate_triton",
    cuda="yaongi.kernels.moe.experts_backward:moe_backward_accumulate_cuda",
    triton_refuses=_backward_triton_refuses,
    cuda_refuses=_accumulate_cuda_refuses,
)
backend.define_autograd("moe", _backward, _setup_context)
backend.define_no_autograd("moe_backward")


class _Accumulating(torch.autograd.Function):
    """The experts with weight gradients that are accumulated outside autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        weight_gradients: tuple[Tensor, Tensor],
    ) -> Tensor:
        y, a = _op(x, w_up, w_down, expert_ids, expert_weights)
        ctx.save_for_backward(x, w_up, w_down, expert_ids, expert_weights, a)
        ctx.weight_gradients = weight_gradients
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweights = _accumulate_op(*grads, *ctx.saved_tensors, *ctx.weight_gradients)
        return dx, None, None, None, dweights, None


def moe_route(logits: Tensor, bias: Tensor, top_k: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Choose each token's experts and weigh them.

    With scores = sigmoid(logits), a token takes the K experts with the largest score + bias, in descending order, ties
    to the lowest index; a NaN ranks highest. Its weights are their scores without bias, divided by the scores' sum,
    times `scale`.

    Args:
        logits: (T, E), float32 (float64 too, for tests of gradients).
        bias: (E), dtype of logits; it affects only the choice and gets no gradient.
        top_k: K, 1 to E.
        scale: a finite number.

    Returns:
        expert_ids (T, K) int32; expert_weights (T, K) in the dtype of logits, through which the gradient flows;
        load (E) int32, the number of tokens that chose each expert.

    Raises:
        TypeError: dtype, device or kind. ValueError: shape or value.
    """
    args = check.Arguments("moe_route")
    args.tensor("logits", logits, ("T", "E"), (torch.float32, torch.float64))
    args.tensor("bias", bias, ("E",), (logits.dtype,))
    args.integer("top_k", top_k, 1, logits.shape[1], " (E)")
    args.number("scale", scale)
    return _route_op(logits, bias, top_k, scale)


def moe(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    *,
    weight_gradients: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Apply squared-ReLU experts: y_t = Σ_k g_tk · W_down[e]·relu(W_up[e]·x_t)², with e = expert_ids[t, k].

    A pair whose expert id is not in 0..E − 1 is skipped. Checked mode refuses such a pair, unless its id is −1, and a
    token with the same expert twice. For the backward the arguments and one activation are saved: relu(H)², (T·K, F)
    in x's dtype.

    Args:
        x: (T, D), float16, bfloat16, float32 or float64.
        w_up: (E, F, D), dtype of x.
        w_down: (E, D, F), dtype of x.
        expert_ids: (T, K) int32.
        expert_weights: (T, K) float32 (float64 for x in float64), g.
        weight_gradients: contiguous, like w_up and w_down but float32 (float64 for x in float64): the backward pass
            adds the weights' gradients to these, unrounded, and autograd gets none. None: autograd gets them.

    Returns:
        y: (T, D) in x's dtype, contiguous; accumulated in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: dtype, device or kind. ValueError: shape or value.
    """
    args = check.Arguments("moe")
    args.tensor("x", x, ("T", "D"))
    args.tensor("w_up", w_up, ("E", "F", "D"), (x.dtype,))
    args.tensor("w_down", w_down, ("E", "D", "F"), (x.dtype,))
    args.tensor("expert_ids", expert_ids, ("T", "K"), (torch.int32,))
    args.tensor("expert_weights", expert_weights, ("T", "K"), (torch.promote_types(x.dtype, torch.float32),))
    if weight_gradients is None:
        return _op(x, w_up, w_down, expert_ids, expert_weights)[0]
    for name, value, like in zip(("dw_up", "dw_down"), weight_gradients, (w_up, w_down), strict=True):
        name = f"weight_gradients' {name}"
        args.tensor(name, value, ("E", "F", "D") if like is w_up else ("E", "D", "F"), (expert_weights.dtype,))
        args.require(value.is_contiguous(), name, "contiguous", f"strides {tuple(value.stride())}")
    return _Accumulating.apply(x, w_up, w_down, expert_ids, expert_weights, weight_gradients)
