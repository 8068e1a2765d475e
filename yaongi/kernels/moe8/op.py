"""`moe8` and `moe8_backward`: registration and the public functions."""

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.fp8_quantize.op import SCALAR, refuses_gpu
from yaongi.kernels.fp8_quantize.reference import E4M3
from yaongi.kernels.moe.op import check_ids
from yaongi.kernels.moe8.reference import moe8_backward_reference, moe8_reference

Tensor = torch.Tensor
WIDE = (torch.float32, torch.float64)


def _fake(
    x8: Tensor,
    unit_x: Tensor,
    w_up8: Tensor,
    w_down8: Tensor,
    unit_up: Tensor,
    unit_down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    scale: Tensor,
    amax: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return x8.new_empty(x8.shape, dtype=dtype), x8.new_empty(expert_ids.numel(), w_up8.shape[1])


def _backward_fake(d8: Tensor, unit_d: Tensor, dy: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    expert_weights, a8 = rest[6:8]
    return dy.new_empty(dy.shape), expert_weights.new_empty(expert_weights.shape), a8.new_empty(a8.shape)


def _value_check(
    x8: Tensor,
    unit_x: Tensor,
    w_up8: Tensor,
    w_down8: Tensor,
    unit_up: Tensor,
    unit_down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    *rest: object,
) -> None:
    check.finite("moe8", x8=x8, unit_x=unit_x, w_up8=w_up8, w_down8=w_down8, unit_up=unit_up, unit_down=unit_down)
    check.finite("moe8", expert_weights=expert_weights)
    check_ids("moe8", expert_ids, len(w_up8))


def _triton_refuses(x8: Tensor, *rest: object) -> str | None:
    expert_ids, dtype = rest[5], rest[-1]
    return refuses_gpu(x8.device) or _refuses(expert_ids, dtype) or backend.refuses_float64(*rest)


def _backward_triton_refuses(d8: Tensor, unit_d: Tensor, dy: Tensor, *rest: object) -> str | None:
    return refuses_gpu(d8.device) or _refuses(rest[5], dy.dtype) or backend.refuses_float64(*rest)


def _refuses(expert_ids: object, dtype: object) -> str | None:
    if isinstance(expert_ids, Tensor) and not expert_ids.shape[1]:
        return "it takes K of 1 or more, got 0"
    if dtype not in check.HALF_DTYPES:
        return f"its results are float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    return None


def _backward_cuda_refuses(d8: Tensor, unit_d: Tensor, dy: Tensor, *rest: object) -> str | None:
    """Only the weights' gradients are in CUDA; the rest is Triton's."""
    return backend.unavailable("triton", d8.get_device()) or _backward_triton_refuses(d8, unit_d, dy, *rest)


_op = backend.define(
    "moe8(Tensor x8, Tensor unit_x, Tensor w_up8, Tensor w_down8, Tensor unit_up, Tensor unit_down, Tensor expert_ids,"
    " Tensor expert_weights, Tensor scale, Tensor(a!) amax, Tensor? residual, ScalarType dtype)"
    " -> (Tensor y, Tensor a8)",
    reference=moe8_reference,
    fake=_fake,
    triton="yaongi.kernels.moe8.fp8_experts:moe8_triton",
    triton_refuses=_triton_refuses,
    value_check=_value_check,
)
_backward_op = backend.define(
    "moe8_backward(Tensor d8, Tensor unit_d, Tensor dy, Tensor x, Tensor w_up8t, Tensor w_down8t, Tensor unit_up,"
    " Tensor unit_down, Tensor expert_ids, Tensor expert_weights, Tensor a8, Tensor unit_a, Tensor scale,"
    " Tensor(a!) amax, Tensor? addend, Tensor(b!)? dw_up, Tensor(c!)? dw_down)"
    " -> (Tensor dx, Tensor dexpert_weights, Tensor dh8)",
    reference=moe8_backward_reference,
    fake=_backward_fake,
    triton="yaongi.kernels.moe8.fp8_experts:moe8_backward_triton",
    triton_refuses=_backward_triton_refuses,
    cuda="yaongi.kernels.moe8.fp8_experts:moe8_backward_cuda",
    cuda_refuses=_backward_cuda_refuses,
)


def moe8(
    x8: Tensor,
    unit_x: Tensor,
    w_up8: Tensor,
    w_down8: Tensor,
    unit_up: Tensor,
    unit_down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    scale: Tensor,
    amax: Tensor,
    residual: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Apply squared-ReLU experts in FP8: y_t = Σ_k g_tk · W_down[e]·A + residual_t, A = E4M3(relu(W_up[e]·x_t)²·scale).

    A pair whose expert id is not in 0..E − 1 is skipped. Checked mode refuses such a pair, unless its id is −1, and a
    token with the same expert twice.

    Args:
        x8: (T, D), float8_e4m3fn; D a multiple of 16.
        w_up8, w_down8: (E, F, D) and (E, D, F), float8_e4m3fn; F a multiple of 16.
        unit_x, unit_up, unit_down: (), float32, what one step of the codes stands for.
        expert_ids: (T, K) int32.
        expert_weights: (T, K) float32 or float64, g.
        scale, amax: as for `quantize8`, of A.
        residual: (T, D), any float: added before the result is rounded.
        dtype: of y: bfloat16, float16, float32 or float64.

    Returns:
        y (T, D) in `dtype`, accumulated in float32 (float64 for float64); a8 (T·K, F), float8_e4m3fn, for
        `moe8_backward`: the rows of A sorted by expert, and last those of skipped pairs, with any values; contiguous.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape or value.
    """
    args = check.Arguments("moe8")
    _check_codes(args, "x8", x8, ("T", "D"))
    _check_codes(args, "w_up8", w_up8, ("E", "F", "D"))
    _check_codes(args, "w_down8", w_down8, ("E", "D", "F"))
    _check_routing(args, expert_ids, expert_weights)
    _check_scalars(args, unit_x=unit_x, unit_up=unit_up, unit_down=unit_down, scale=scale, amax=amax)
    args.optional("residual", residual, ("T", "D"))
    args.choice("dtype", dtype, check.FLOAT_DTYPES)
    inputs = x8, unit_x, w_up8, w_down8, unit_up, unit_down, expert_ids, expert_weights
    return _op(*inputs, scale, amax, residual, dtype)


def moe8_backward(
    d8: Tensor,
    unit_d: Tensor,
    dy: Tensor,
    x: Tensor,
    w_up8t: Tensor,
    w_down8t: Tensor,
    unit_up: Tensor,
    unit_down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    a8: Tensor,
    unit_a: Tensor,
    scale: Tensor,
    amax: Tensor,
    addend: Tensor | None = None,
    dw_up: Tensor | None = None,
    dw_down: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `moe8`, and add those of the weights to dw_up and dw_down.

    The products that lead to dx take operands in FP8. Those of the weights' gradients take dy, x, A and dH in dy's
    dtype.

    Args:
        d8: (T, D), float8_e4m3fn, the cast of dy; D a multiple of 16.
        dy, x: (T, D), of one dtype: the gradient of y, and what x8 is the cast of.
        w_up8t, w_down8t: (E, D, F) and (E, F, D), float8_e4m3fn, the forward's weights transposed; F a multiple of 16.
        expert_ids, expert_weights: what the forward took.
        a8: (T·K, F), what the forward returned.
        unit_d, unit_up, unit_down, unit_a: (), float32, what one step of the codes stands for.
        scale, amax: as for `quantize8`, of dH, the gradient before the squared ReLU.
        addend: (T, D), any float: another gradient of x, added to dx before it is rounded.
        dw_up, dw_down: (E, F, D) and (E, D, F), contiguous, float32 (float64 for dy in float64), in place: the weights'
            gradients are added, unrounded; None: not computed.

    Returns:
        dx (T, D) in dy's dtype; dexpert_weights (T, K); dh8 (T·K, F), float8_e4m3fn, dH with rows as in a8; contiguous.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape or stride.
    """
    args = check.Arguments("moe8_backward")
    _check_codes(args, "d8", d8, ("T", "D"))
    args.tensor("dy", dy, ("T", "D"))
    args.tensor("x", x, ("T", "D"), (dy.dtype,))
    _check_codes(args, "w_up8t", w_up8t, ("E", "D", "F"))
    _check_codes(args, "w_down8t", w_down8t, ("E", "F", "D"))
    _check_routing(args, expert_ids, expert_weights)
    args.tensor("a8", a8, ("T·K", "F"), (E4M3,))
    args.require(len(a8) == expert_ids.numel(), "a8", f"(T·K, F) = ({expert_ids.numel()}, F)", tuple(a8.shape))
    _check_scalars(args, unit_d=unit_d, unit_up=unit_up, unit_down=unit_down, unit_a=unit_a, scale=scale, amax=amax)
    args.optional("addend", addend, ("T", "D"))
    for name, total, dims in (("dw_up", dw_up, ("E", "F", "D")), ("dw_down", dw_down, ("E", "D", "F"))):
        if total is not None:
            args.tensor(name, total, dims, (torch.promote_types(dy.dtype, torch.float32),))
            args.require(total.is_contiguous(), name, "contiguous", f"strides {tuple(total.stride())}")
    inputs = d8, unit_d, dy, x, w_up8t, w_down8t, unit_up, unit_down, expert_ids, expert_weights, a8, unit_a
    return _backward_op(*inputs, scale, amax, addend, dw_up, dw_down)


def _check_codes(args: check.Arguments, name: str, value: Tensor, dims: tuple[str, ...]) -> None:
    args.tensor(name, value, dims, (E4M3,))
    for letter in "DF":
        size = args.sizes.get(letter, 0)
        args.require(size % 16 == 0, name, f"({', '.join(dims)}) with {letter} % 16 == 0", tuple(value.shape))


def _check_routing(args: check.Arguments, expert_ids: Tensor, expert_weights: Tensor) -> None:
    args.tensor("expert_ids", expert_ids, ("T", "K"), (torch.int32,))
    args.tensor("expert_weights", expert_weights, ("T", "K"), WIDE)


def _check_scalars(args: check.Arguments, **scalars: Tensor) -> None:
    for name, value in scalars.items():
        args.tensor(name, value, (), SCALAR)
