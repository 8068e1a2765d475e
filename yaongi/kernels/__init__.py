"""The public ops of Open-Yaongi."""

from yaongi.kernels.backend import check_values, info, use_backend
from yaongi.kernels.symmetric_product.op import symmetric_product

__all__ = ["check_values", "info", "symmetric_product", "use_backend"]
