"""`mamba_scan` and `mamba_step`: registration and the public functions."""

from typing import Literal, overload

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.common.dtypes import compute_dtype
from yaongi.kernels.mamba_scan.reference import (
    mamba_scan_backward_reference,
    mamba_scan_reference,
    mamba_step_reference,
)

Tensor = torch.Tensor
WIDE = (torch.float32, torch.float64)


def _fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, head_dim = x.shape
    shape = (batch, heads, head_dim, b.shape[3]) if return_final_state else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=compute_dtype(x, dt, A, b, c, D, dt_bias, initial_state))


def _backward_fake(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, ...]:
    inputs = (x, dt, A, b, c, D, dt_bias, initial_state)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _step_fake(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.return_final_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy: Tensor | None, dfinal_state: Tensor | None):  # type: ignore[no-untyped-def]
    *inputs, document_ids, initial_state = ctx.saved_tensors
    x = inputs[0]
    dy = x.new_zeros(x.shape) if dy is None else dy
    dfinal_state = dfinal_state if ctx.return_final_state else None
    gradients = _backward_op(dy, dfinal_state, *inputs, document_ids, initial_state)
    *dinputs, dinitial_state = (
        None if t is None else d for t, d in zip((*inputs, initial_state), gradients, strict=True)
    )
    return *dinputs, None, dinitial_state, None


def _value_check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> None:
    check.finite("mamba_scan", x=x, dt=dt, A=A, b=b, c=c, D=D, dt_bias=dt_bias, initial_state=initial_state)
    check.documents("mamba_scan", document_ids)
    _check_decay("mamba_scan", A)


def _step_value_check(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> None:
    check.finite("mamba_step", state=state, x=x, dt=dt, A=A, b=b, c=c, D=D, dt_bias=dt_bias)
    _check_decay("mamba_step", A)


def _check_decay(op: str, A: Tensor) -> None:
    if bool((A > 0).any()):
        raise ValueError(f"{op}: A must be negative, got a largest value of {float(A.max()):g}")


def _triton_refuses(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, *rest: object) -> str | None:
    head_dim, state = x.shape[3], b.shape[3]
    if head_dim % 8 or state % 8:
        return f"it takes P and N in multiples of 8, got {head_dim} and {state}"
    if not 8 <= state <= 256:
        return f"it takes N from 8 to 256, got {state}"
    return backend.refuses_float64(x, dt, A, b, *rest)


def _backward_triton_refuses(dy: Tensor, dfinal_state: Tensor | None, *inputs: Tensor) -> str | None:
    return refuses_batch(dy) or _triton_refuses(*inputs)


def refuses_batch(dy: Tensor) -> str | None:
    """Refuse a batch that exceeds a grid's third dimension."""
    return f"it takes B up to 65535, got {dy.shape[0]}" if dy.shape[0] > 65535 else None


def cuda_refuses_sizes(x: Tensor, heads: int, head_dim: int, groups: int, state: int) -> str | None:
    """Refuse what the backward kernel in CUDA isn't written for; x is an input in the scan's dtype."""
    if x.dtype != torch.bfloat16 or not x.numel():
        return f"it takes bfloat16 and one token or more, got {x.dtype} of {tuple(x.shape)}"
    if (head_dim, state) != (64, 128):
        return f"it takes P 64 and N 128, got {head_dim} and {state}"
    each = heads // groups  # four a block; with four blocks a group Triton is faster (docs/LAB.md)
    return None if each in (4, 8) else f"it takes 4 or 8 heads a group, got {each}"


def _backward_cuda_refuses(dy: Tensor, dfinal_state: Tensor | None, *inputs: Tensor) -> str | None:
    x, b = inputs[0], inputs[3]
    return cuda_refuses_sizes(x, *x.shape[2:], *b.shape[2:]) or _triton_refuses(*inputs)


def _step_triton_refuses(state: Tensor, *rest: object) -> str | None:
    if not 1 <= state.shape[3] <= 1024:
        return f"it takes N from 1 to 1024, got {state.shape[3]}"
    return backend.refuses_float64(state, *rest)


_op = backend.define(
    "mamba_scan(Tensor x, Tensor dt, Tensor A, Tensor b, Tensor c, Tensor? D, Tensor? dt_bias, Tensor? document_ids, "
    "Tensor? initial_state, bool return_final_state) -> (Tensor y, Tensor final_state)",
    reference=mamba_scan_reference,
    fake=_fake,
    triton="yaongi.kernels.mamba_scan.scan_forward:mamba_scan_triton",
    triton_refuses=_triton_refuses,
    value_check=_value_check,
)
_backward_op = backend.define(
    "mamba_scan_backward(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor dt, Tensor A, Tensor b, Tensor c, "
    "Tensor? D, Tensor? dt_bias, Tensor? document_ids, Tensor? initial_state) -> (Tensor dx, Tensor ddt, Tensor dA, "
    "Tensor db, Tensor dc, Tensor dD, Tensor ddt_bias, Tensor dinitial_state)",
    reference=mamba_scan_backward_reference,
    fake=_backward_fake,
    triton="yaongi.kernels.mamba_scan.scan_backward:mamba_scan_backward_triton",
    triton_refuses=_backward_triton_refuses,
    cuda="yaongi.kernels.mamba_scan.reverse_walk:mamba_scan_backward_cuda",
    cuda_refuses=_backward_cuda_refuses,
)
_step_op = backend.define(
    "mamba_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor b, Tensor c, Tensor? D, Tensor? dt_bias) "
    "-> Tensor",
    reference=mamba_step_reference,
    fake=_step_fake,
    triton="yaongi.kernels.mamba_scan.decode:mamba_step_triton",
    triton_refuses=_step_triton_refuses,
    value_check=_step_value_check,
)
backend.define_autograd("mamba_scan", _backward, _setup_context)
backend.define_no_autograd("mamba_scan_backward")


@overload
def mamba_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
) -> Tensor: ...


@overload
def mamba_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def mamba_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba-2's recurrence h_t = exp(δ_t·A)·h_{t−1} + δ_t·x_t ⊗ b_t and return y_t = h_t·c_t + D·x_t.

    δ = softplus(dt + dt_bias), not clamped (arXiv 2405.21060). Head h reads group h // (H / G) of b and c. Every
    document starts with a zero state; the initial state belongs to the first document of its row.

    Args:
        x: (B, L, H, P), any float, L ≥ 1, unit stride along P.
        dt: (B, L, H), any float.
        A: (H), float32 (or float64), not positive.
        b, c: (B, L, G, N), x's dtype, G dividing H, unit stride along N.
        D, dt_bias: (H), any float.
        document_ids: (B, L), int32, non-decreasing along L.
        initial_state: (B, H, P, N), float32 (or float64), the state before the first token; zeros when None.
        return_final_state: also return the state after the last token, which belongs to the last document.

    Returns:
        y (B, L, H, P) in x's dtype, contiguous; with return_final_state (y, final state (B, H, P, N) in float32,
        float64 when an argument is).

    Raises:
        TypeError: kind, dtype or device. ValueError: shape, stride or value.
    """
    args = check.Arguments("mamba_scan")
    _check_operands(args, ("B", "L"), x, dt, A, b, c, D, dt_bias)
    args.optional("document_ids", document_ids, ("B", "L"), (torch.int32,))
    args.optional("initial_state", initial_state, ("B", "H", "P", "N"), WIDE)
    args.boolean("return_final_state", return_final_state)
    y, final_state = _op(x, dt, A, b, c, D, dt_bias, document_ids, initial_state, return_final_state)
    return (y, final_state) if return_final_state else y


@torch.no_grad()
def mamba_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> Tensor:
    """Advance `mamba_scan` by one token from the state after the tokens so far; it has no gradient.

    Args:
        state: (B, H, P, N), float32 or float16 (or float64); updated in place.
        x: (B, H, P), any float, unit stride along P.
        dt: (B, H), any float.
        A: (H), float32 (or float64), not positive.
        b, c: (B, G, N), x's dtype, G dividing H, unit stride along N.
        D, dt_bias: (H), any float.

    Returns:
        y (B, H, P) in x's dtype, contiguous.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape or stride.
    """
    args = check.Arguments("mamba_step")
    args.tensor("state", state, ("B", "H", "P", "N"), (torch.float16, *WIDE), written=True)
    _check_operands(args, ("B",), x, dt, A, b, c, D, dt_bias)
    return _step_op(state, x, dt, A, b, c, D, dt_bias)


def _check_operands(
    args: check.Arguments,
    lead: tuple[str, ...],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    """Check the arguments that scan and step share; `lead` names the dimensions before the heads."""
    args.tensor("x", x, (*lead, "H", "P"), unit_stride=True)
    args.require(args.sizes.get("L") != 0, "x", "(B, L, H, P) with L >= 1", tuple(x.shape))
    args.tensor("dt", dt, (*lead, "H"))
    args.tensor("A", A, ("H",), WIDE)
    args.optional("D", D, ("H",))
    args.optional("dt_bias", dt_bias, ("H",))
    projection = (*lead, "G", "N")
    args.tensor("b", b, projection, (x.dtype,), unit_stride=True)
    args.tensor("c", c, projection, (x.dtype,), unit_stride=True)
    groups, heads = args.sizes["G"], args.sizes["H"]
    divides = groups >= 1 and heads % groups == 0
    args.require(divides, "b", f"({', '.join(projection)}) with G dividing H = {heads}", tuple(b.shape))
