"""Products of FP8 matrices in plain torch; README.md in this folder defines them."""

import torch

from yaongi.kernels.fp8_quantize.reference import dequantized

Tensor = torch.Tensor


def matmul8_reference(
    a: Tensor,  # (M, K)
    b: Tensor,  # (N, K)
    unit_a: Tensor,  # ()
    unit_b: Tensor,  # ()
    addend: Tensor | None,  # (M, N)
    dtype: torch.dtype,
    exact: bool,
) -> Tensor:  # (M, N)
    """Return a·bᵀ·unit_a·unit_b + addend, computed in float32 (float64 for float64) and rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    product = dequantized(a, unit_a, wide) @ dequantized(b, unit_b, wide).T
    if addend is not None:
        product = product + addend.to(wide)
    return product.to(dtype)


def matmul8_add_reference(
    a: Tensor,  # (M, K)
    b: Tensor,  # (N, K)
    unit_a: Tensor,  # ()
    unit_b: Tensor,  # ()
    total: Tensor,  # (M, N)
    exact: bool,
) -> None:
    """Do total += a·bᵀ·unit_a·unit_b."""
    total.copy_(matmul8_reference(a, b, unit_a, unit_b, total, total.dtype, exact))
