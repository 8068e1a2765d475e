"""The symmetric product in plain torch; README.md in this folder has the mathematics."""

import torch


def symmetric_product_reference(
    x: torch.Tensor,  # (…, m, n)
    y: torch.Tensor | None,  # (…, m, n)
    c: torch.Tensor | None,  # (…, m, m)
    alpha: float,
    beta: float,
) -> torch.Tensor:  # (…, m, m)
    """Return α·X·Yᵀ + β·C, rounded once to x's dtype; Y defaults to X."""
    wide = torch.promote_types(x.dtype, torch.float32)
    product = alpha * (x.to(wide) @ (x if y is None else y).to(wide).mT)
    if c is not None:
        product = product + beta * c.to(wide)
    return product.to(x.dtype)
