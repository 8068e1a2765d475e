"""The casts to FP8 in plain torch; README.md in this folder defines them."""

import torch

from yaongi.kernels.common.dtypes import compute_dtype

Tensor = torch.Tensor
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # E4M3's


def quantized(values: Tensor, scale: Tensor) -> Tensor:
    """Return E4M3(values · scale), saturated, to nearest even; NaN stays NaN."""
    return (values * scale.to(values.dtype)).clamp(-LARGEST, LARGEST).to(E4M3)


def dequantized(codes: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes · unit, exact where the unit is a power of two."""
    return codes.to(dtype) * unit.to(dtype)


def note_largest(amax: Tensor, values: Tensor) -> None:
    """Set amax to the largest of itself and |values|; NaN and infinity win."""
    if values.numel():
        amax.copy_(torch.maximum(amax, values.abs().amax().to(amax.dtype)))


def power_of_two_scale(largest: Tensor) -> Tensor:
    """Return 2^⌊log2(448 / largest)⌋ in float32, at most 2^126; 1 where largest is 0, NaN where it is not finite."""
    bits = largest.float().view(torch.int32)
    above = ((bits & 0x7FFFFF) > 0x600000).int()  # a mantissa above 1.75, that of 448 = 1.75 · 2^8
    exponent = (262 - (bits >> 23) - above).clamp(max=253)  # of float32, biased: 127 + 8 - (biased - 127) - above
    scale = torch.where(largest == 0, torch.ones_like(largest), (exponent << 23).view(torch.float32))
    return torch.where(largest.isfinite(), scale, torch.full_like(largest, torch.nan)).float()


def both_orders(x8: Tensor, row: bool, column: bool) -> tuple[Tensor, Tensor]:
    """Return x8 and its transpose, contiguous; empty what isn't wanted."""
    return x8 if row else x8.new_empty(0), transpose8_reference(x8) if column else x8.new_empty(0)


def quantize8_reference(
    x: Tensor,  # (T, D)
    scale: Tensor,  # ()
    amax: Tensor,  # ()
    row: bool,
    column: bool,
) -> tuple[Tensor, Tensor]:  # (T, D) or empty, (D, T) or empty
    """Return x in E4M3, in row order and transposed."""
    values = x.to(compute_dtype(x))
    note_largest(amax, values)
    return both_orders(quantized(values, scale).contiguous(), row, column)


def transpose8_reference(x8: Tensor) -> Tensor:  # (…, T, D) to (…, D, T)
    """Return the same bytes with the last two dimensions swapped in memory."""
    return x8.mT.clone(memory_format=torch.contiguous_format)


def quantize_weight8_reference(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (…, R, C) to the same, (…, C, R), ()
    """Return w in E4M3 with the largest power-of-two scale that doesn't saturate, its transpose, and the unit."""
    values = w.to(compute_dtype(w))
    largest = values.abs().amax() if w.numel() else values.new_zeros(())
    scale = power_of_two_scale(largest.float())
    w8 = quantized(values, scale).contiguous()
    return w8, transpose8_reference(w8), 1 / scale


def squared_relu8_reference(
    h: Tensor,  # (T, F)
    scale: Tensor,  # ()
    amax: Tensor,  # ()
) -> tuple[Tensor, Tensor]:  # (T, F), (F, T)
    """Return relu(h)² in E4M3, in row order and transposed."""
    values = h.to(compute_dtype(h)).relu().square()
    note_largest(amax, values)
    return both_orders(quantized(values, scale).contiguous(), True, True)


def squared_relu8_backward_reference(
    da: Tensor,  # (T, F)
    a8: Tensor,  # (T, F)
    unit: Tensor,  # ()
    scale: Tensor,  # ()
    amax: Tensor,  # ()
) -> tuple[Tensor, Tensor]:  # (T, F), (F, T)
    """Return dh = 2·√a·da in E4M3, in row order and transposed."""
    wide = compute_dtype(da)
    values = 2 * dequantized(a8, unit, wide).sqrt() * da.to(wide)
    note_largest(amax, values)
    return both_orders(quantized(values, scale).contiguous(), True, True)
