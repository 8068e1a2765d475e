"""FP8 products by torch's own `_scaled_mm`, for GPUs without `_C.so`; a sum is added after the product."""

import torch

Tensor = torch.Tensor


def aligned_unit(unit: Tensor) -> Tensor:
    """Return a unit where cuBLASLt takes it: at a multiple of 16 bytes, which an entry of a vector may not be."""
    return unit if unit.data_ptr() % 16 == 0 else unit.clone()


def matmul8_scaled_mm(
    a: Tensor,
    b: Tensor,
    unit_a: Tensor,
    unit_b: Tensor,
    addend: Tensor | None,
    dtype: torch.dtype,
    exact: bool,
) -> Tensor:
    """Compute what `matmul8_reference` does."""
    wide = dtype if addend is None else torch.float32
    if not (a.numel() and b.numel()):
        product = torch.zeros(a.shape[0], b.shape[0], dtype=wide, device=a.device)
    else:
        units = aligned_unit(unit_a), aligned_unit(unit_b)
        product = torch._scaled_mm(a, b.T, *units, out_dtype=wide, use_fast_accum=not exact)
    return product if addend is None else product.add_(addend).to(dtype)


def matmul8_add_scaled_mm(a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, total: Tensor, exact: bool) -> None:
    """Compute what `matmul8_add_reference` does."""
    total.add_(matmul8_scaled_mm(a, b, unit_a, unit_b, None, torch.float32, exact))
