"""`symmetric_product`: registration, the CUDA launcher, and the public function."""

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.symmetric_product.reference import symmetric_product_reference

Tensor = torch.Tensor


def _symmetric_product_cuda(x: Tensor, y: Tensor | None, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    if not x.numel():
        return symmetric_product_reference(x, y, c, alpha, beta)
    *batch, m, _ = x.shape
    out = x.new_empty((*batch, m, m))
    if len(batch) > 1:  # the kernel has one stride for the whole batch
        x, y, c = x.flatten(0, -3), *(None if t is None else t.flatten(0, -3) for t in (y, c))
    backend.cuda_launcher("symmetric_product")(x, y, c, alpha, beta, out)
    return out


def _cuda_refuses(x: Tensor, y: Tensor | None, c: Tensor | None, alpha: float, beta: float) -> str | None:
    m, n = x.shape[-2:]
    if x.dtype not in check.HALF_DTYPES:
        return f"it takes float16 and bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    if m % 8 or n % 8:
        return f"it takes m and n that are multiples of 8, got m = {m}, n = {n}"
    return None


def _fake(x: Tensor, y: Tensor | None, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-2])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, y, _, ctx.alpha, ctx.beta = inputs
    ctx.save_for_backward(x, y)


def _backward(ctx, dout: Tensor):  # type: ignore[no-untyped-def]
    """Return dX = α·dS·Y, dY = α·dSᵀ·X and dC = β·dS; where Y is X the first two are added."""
    x, y = ctx.saved_tensors
    needs_x, needs_y, needs_c = ctx.needs_input_grad[:3]
    dx = dy = None
    with torch.autocast(x.device.type, enabled=False):
        if y is None:
            dx = ctx.alpha * ((dout + dout.mT) @ x)
        else:
            dx = ctx.alpha * (dout @ y) if needs_x else None
            dy = ctx.alpha * (dout.mT @ x) if needs_y else None
    return dx, dy, ctx.beta * dout if needs_c else None, None, None


def _value_check(x: Tensor, y: Tensor | None, c: Tensor | None, alpha: float, beta: float) -> None:
    check.finite("symmetric_product", x=x, y=y, c=c)


_op = backend.define(
    "symmetric_product(Tensor x, Tensor? y, Tensor? c, float alpha, float beta) -> Tensor",
    reference=symmetric_product_reference,
    fake=_fake,
    cuda=_symmetric_product_cuda,
    cuda_refuses=_cuda_refuses,
    value_check=_value_check,
)
backend.define_autograd("symmetric_product", _backward, _setup_context)


def symmetric_product(
    x: Tensor, y: Tensor | None = None, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Return α·X·Yᵀ + β·C for results known to be symmetric; on an H100 one half is computed and mirrored.

    The caller must ensure that X·Yᵀ and C are symmetric: the CUDA kernel computes and reads only their lower triangle.

    Args:
        x: (…, m, n), float16, bfloat16, float32 or float64, unit stride along n.
        y: like x; X itself when None.
        c: (…, m, m), x's dtype, unit stride along its last dimension; None: no addend.
        alpha, beta: finite numbers.

    Returns:
        (…, m, m) in x's dtype, contiguous; accumulated in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: dtype or device. ValueError: shape or stride.
    """
    args = check.Arguments("symmetric_product")
    args.tensor("x", x, ("...", "m", "n"), unit_stride=True)
    for name, value, dims in (("y", y, ("...", "m", "n")), ("c", c, ("...", "m", "m"))):
        if value is not None:
            args.tensor(name, value, dims, (x.dtype,), unit_stride=True)
            batch, got = tuple(x.shape[:-2]), tuple(value.shape[:-2])
            args.require(got == batch, name, f"batched as x, {batch}", got)
    args.number("alpha", alpha)
    args.number("beta", beta)
    return _op(x, y, c, alpha, beta)
