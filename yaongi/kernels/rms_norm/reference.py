"""The RMS norms in plain torch; README.md in this folder has the mathematics."""

import torch
from torch.nn import functional as F

from yaongi.kernels.common.dtypes import compute_dtype
from yaongi.kernels.fp8_quantize.reference import note_largest, quantized, transpose8_reference

Tensor = torch.Tensor


def rms_norm_reference(
    x: Tensor,  # (…, D)
    weight: Tensor,  # (D)
    residual: Tensor | None,  # (…, D)
    eps: float,
) -> tuple[Tensor, Tensor]:  # (…, D), (…, D) or empty
    """Return the normalised x + residual, and the sum itself when there is a residual."""
    wide = compute_dtype(x, weight)
    if residual is None:
        return _rounded(_normalised(x.to(wide), eps) * weight.to(wide), x.dtype), x.new_empty(0)
    wide = torch.promote_types(wide, residual.dtype)
    total = _rounded(x.to(wide) + residual.to(wide), residual.dtype)
    return _rounded(_normalised(total.to(wide), eps) * weight.to(wide), x.dtype), total


def rms_norm_backward_reference(
    dy: Tensor,  # (…, D)
    dsum: Tensor | None,  # (…, D)
    u: Tensor,  # (…, D), the normalised input: x or the sum
    weight: Tensor,  # (D)
    eps: float,
) -> tuple[Tensor, Tensor]:  # (…, D) like u, (D) float32 or float64
    """Return the gradients of u, including that of the returned sum, and of the weight."""
    wide = compute_dtype(u, weight)
    du, dweight = _norm_gradients(dy.to(wide), u.to(wide), weight.to(wide), eps, groups=1)
    if dsum is not None:
        du = du + dsum.to(wide)
    return _rounded(du, u.dtype), dweight


def gated_rms_norm_reference(
    x: Tensor,  # (…, D)
    z: Tensor,  # (…, D)
    weight: Tensor,  # (D)
    eps: float,
    groups: int,
) -> Tensor:  # (…, D)
    """Return x·silu(z), normalised over each group of channels and scaled by the weight."""
    wide = compute_dtype(x, weight)
    gated = x.to(wide) * F.silu(z.to(wide))
    normalised = _normalised(gated.unflatten(-1, (groups, -1)), eps).flatten(-2)
    return _rounded(normalised * weight.to(wide), x.dtype)


def gated_rms_norm_backward_reference(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:  # like x, like z, (D) float32 or float64
    """Return the gradients of x, z and the weight."""
    wide = compute_dtype(x, weight)
    x, z = x.to(wide), z.to(wide)
    sigmoid = torch.sigmoid(z)
    du, dweight = _norm_gradients(dy.to(wide), x * z * sigmoid, weight.to(wide), eps, groups)
    dx = du * z * sigmoid
    dz = du * x * sigmoid * (1 + z * (1 - sigmoid))
    return _rounded(dx, dy.dtype), _rounded(dz, dy.dtype), dweight


def _rounded(result: Tensor, dtype: torch.dtype) -> Tensor:
    return result.to(dtype).contiguous()


def _normalised(u: Tensor, eps: float) -> Tensor:
    return u * _inverse_rms(u, eps)


def _inverse_rms(u: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)


def _norm_gradients(dy: Tensor, u: Tensor, weight: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor]:
    """Return du (…, D) and dweight (D) of y = u·r·weight, with r computed per group."""
    u = u.unflatten(-1, (groups, -1))  # (…, J, D / J)
    inverse_rms = _inverse_rms(u, eps)
    normalised = u * inverse_rms
    dnormalised = (dy * weight).unflatten(-1, (groups, -1))
    du = inverse_rms * (dnormalised - normalised * (dnormalised * normalised).mean(-1, keepdim=True))
    dweight = (dy * normalised.flatten(-2)).reshape(-1, dy.shape[-1]).sum(0)
    return du.flatten(-2), dweight


def rms_norm8_reference(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (D)
    eps: float,
    scale: Tensor,  # ()
    amax: Tensor,  # ()
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (T, D), (T, D) or empty, (T)
    """Return the normalised x in E4M3, with `wide` also in x's dtype, and r of each row."""
    kept = compute_dtype(x, weight)
    inverse_rms = _inverse_rms(x.to(kept), eps)
    y = x.to(kept) * inverse_rms * weight.to(kept)
    note_largest(amax, y)
    return quantized(y, scale).contiguous(), _rounded(y, x.dtype) if wide else x.new_empty(0), inverse_rms.squeeze(-1)


def rms_norm8_backward_reference(
    dy: Tensor,  # (T, D)
    extra: Tensor | None,  # (T, D), another gradient of x
    x: Tensor,  # (T, D)
    weight: Tensor,  # (D)
    inverse_rms: Tensor,  # (T)
    scale_y: Tensor,  # ()
    scale_d: Tensor,  # ()
    amax: Tensor,  # ()
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # like x, (T, D), (D, T), (D, T), (D) float32 or float64
    """Return dx, dx in E4M3 in both orders, the forward's output transposed, and dweight."""
    wide = compute_dtype(x, weight)
    dy, weight, inverse_rms = dy.to(wide), weight.to(wide), inverse_rms.to(wide)[:, None]
    normalised = x.to(wide) * inverse_rms
    dnormalised = dy * weight
    dx = inverse_rms * (dnormalised - normalised * (dnormalised * normalised).mean(-1, keepdim=True))
    if extra is not None:
        dx = dx + extra.to(wide)
    note_largest(amax, dx)
    d8, y8 = quantized(dx, scale_d).contiguous(), quantized(normalised * weight, scale_y)
    dweight = (dy * normalised).sum(0)
    return _rounded(dx, x.dtype), d8, transpose8_reference(d8), transpose8_reference(y8), dweight
