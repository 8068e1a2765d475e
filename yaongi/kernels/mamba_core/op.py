"""`mamba_core`: registration and the public function."""

from typing import Any

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.common.dtypes import compute_dtype
from yaongi.kernels.mamba_core.reference import mamba_core_backward_reference, mamba_core_reference
from yaongi.kernels.mamba_scan.op import cuda_refuses_sizes, refuses_batch

Tensor = torch.Tensor

WIDE = (torch.float32, torch.float64)

NAMES = ("projected", "taps", "taps_bias", "A", "D", "dt_bias", "weight")


def _fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    projected, taps, _, _, _, _, weight = inputs[:7]
    lead = projected.shape[:2]
    y, scanned = (projected.new_empty(*lead, weight.shape[0]) for _ in range(2))
    return y, projected.new_empty(*lead, taps.shape[0]), scanned


def _backward_fake(dy: Tensor, xbc: Tensor, scanned: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    projected, taps, taps_bias, A, D, dt_bias, weight = inputs[:7]
    dtaps, dtaps_bias, dweight = (
        t.new_empty(t.shape, dtype=compute_dtype(projected, t)) for t in (taps, taps_bias, weight)
    )
    dprojected, dA, dD, ddt_bias = (t.new_empty(t.shape) for t in (projected, A, D, dt_bias))
    return dprojected, dtaps, dtaps_bias, dA, dD, ddt_bias, dweight


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.groups, ctx.eps = inputs
    _, xbc, scanned = output
    ctx.mark_non_differentiable(xbc, scanned)
    ctx.set_materialize_grads(False)  # else autograd would allocate zeros for the gradients of xbc and scanned
    ctx.save_for_backward(xbc, scanned, *tensors)


def _backward(ctx, dy: Tensor | None, *unused: None):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * (len(NAMES) + 3)
    return *_backward_op(dy, *ctx.saved_tensors, ctx.groups, ctx.eps), None, None, None


def _value_check(*inputs: Any) -> None:
    check.finite("mamba_core", **dict(zip(NAMES, inputs, strict=False)))
    check.documents("mamba_core", inputs[len(NAMES)])


def _triton_refuses(*inputs: Any) -> str | None:
    _, taps, _, A, _, _, weight, _, groups, _ = inputs
    head_dim, state = weight.shape[0] // A.shape[0], (taps.shape[0] - weight.shape[0]) // (2 * groups)
    if taps.shape[1] not in (2, 3, 4):
        return f"it takes W = 2, 3 or 4, got {taps.shape[1]}"
    if head_dim % 8 or state % 8 or not 8 <= state <= 256:
        return f"it takes P and N in multiples of 8, N up to 256, got {head_dim} and {state}"
    return backend.refuses_float64(*inputs)


def _backward_triton_refuses(dy: Tensor, xbc: Tensor, scanned: Tensor, *inputs: Any) -> str | None:
    return refuses_batch(dy) or _triton_refuses(*inputs)


def _backward_cuda_refuses(dy: Tensor, xbc: Tensor, scanned: Tensor, *inputs: Any) -> str | None:
    projected, taps, A, weight, groups = inputs[0], inputs[1], inputs[3], inputs[6], inputs[8]
    heads, width = A.shape[0], weight.shape[0]
    state = (taps.shape[0] - width) // (2 * groups)
    sizes = cuda_refuses_sizes(projected, heads, width // heads, groups, state)
    return sizes or _backward_triton_refuses(dy, xbc, scanned, *inputs)


_INPUTS = (
    "Tensor projected, Tensor taps, Tensor taps_bias, Tensor A, Tensor D, Tensor dt_bias, Tensor weight, "
    "Tensor? document_ids, int groups, float eps"
)

_op = backend.define(
    f"mamba_core({_INPUTS}) -> (Tensor y, Tensor xbc, Tensor scanned)",
    reference=mamba_core_reference,
    fake=_fake,
    triton="yaongi.kernels.mamba_core.combined:mamba_core_triton",
    triton_refuses=_triton_refuses,
    value_check=_value_check,
)

_backward_op = backend.define(
    f"mamba_core_backward(Tensor dy, Tensor xbc, Tensor scanned, {_INPUTS}) -> (Tensor dprojected, Tensor dtaps, "
    "Tensor dtaps_bias, Tensor dA, Tensor dD, Tensor ddt_bias, Tensor dweight)",
    reference=mamba_core_backward_reference,
    fake=_backward_fake,
    triton="yaongi.kernels.mamba_core.combined:mamba_core_backward_triton",
    triton_refuses=_backward_triton_refuses,
    cuda="yaongi.kernels.mamba_core.combined:mamba_core_backward_cuda",
    cuda_refuses=_backward_cuda_refuses,
)

backend.define_autograd("mamba_core", _backward, _setup_context)

backend.define_no_autograd("mamba_core_backward")


def mamba_core(
    projected: Tensor,
    taps: Tensor,
    taps_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    *,
    groups: int,
    eps: float = 1e-5,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Apply a Mamba-2 mixer without its projections: causal_conv1d with silu, mamba_scan, gated_rms_norm.

    The columns of in_proj's output are read in place, and their gradients are written in place.

    Args:
        projected: (B, L, 2·H·P + 2·G·N + H), any float, L ≥ 1, unit stride along columns: z, x, b, c, dt.
        taps, taps_bias: (H·P + 2·G·N, W) and (H·P + 2·G·N), any float, of one dtype.
        A: (H), float32 (or float64), not positive.
        D, dt_bias: (H), any float.
        weight: (H·P), any float, the norm's weight.
        groups: G, divides H; the heads of a group share b and c, and the norm has as many groups.
        eps: a positive number.
        document_ids: (B, L), int32, non-decreasing along L.

    Returns:
        y (B, L, H·P) in projected's dtype, contiguous.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape, stride or value.
    """
    args = check.Arguments("mamba_core")
    _check_tensors(args, projected, taps, taps_bias, A, D, dt_bias, weight, groups)
    args.number("eps", eps)
    args.require(eps > 0, "eps", "positive", eps)
    args.optional("document_ids", document_ids, ("B", "L"), (torch.int32,))
    return _op(projected, taps, taps_bias, A, D, dt_bias, weight, document_ids, groups, eps)[0]


def _check_tensors(
    args: check.Arguments,
    projected: Tensor,
    taps: Tensor,
    taps_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    groups: int,
) -> None:
    args.tensor("projected", projected, ("B", "L", "in"), unit_stride=True)
    args.require(projected.shape[1] >= 1, "projected", "(B, L, in) with L >= 1", tuple(projected.shape))
    args.tensor("taps", taps, ("C", "W"))
    args.tensor("taps_bias", taps_bias, ("C",), (taps.dtype,))
    args.tensor("A", A, ("H",), WIDE)
    args.tensor("D", D, ("H",))
    args.tensor("dt_bias", dt_bias, ("H",))
    args.tensor("weight", weight, ("H·P",))
    args.integer("groups", groups, 1)
    heads, width, channels = A.shape[0], weight.shape[0], taps.shape[0]
    args.require(heads % groups == 0, "groups", f"a divisor of H = {heads}", groups)
    args.require(heads > 0 and width % heads == 0, "weight", f"(H·P) with H = {heads}", tuple(weight.shape))
    wanted = channels >= width and (channels - width) % (2 * groups) == 0
    args.require(wanted, "taps", f"(H·P + 2·G·N, W) with H·P = {width} and G = {groups}", tuple(taps.shape))
    columns = width + channels + heads
    args.require(projected.shape[2] == columns, "projected", f"(B, L, {columns})", tuple(projected.shape))
