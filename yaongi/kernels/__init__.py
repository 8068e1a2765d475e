"""The public ops of Open-Yaongi."""

from yaongi.kernels.backend import check_values, info, use_backend
from yaongi.kernels.causal_conv1d.op import causal_conv1d, causal_conv1d_step
from yaongi.kernels.symmetric_product.op import symmetric_product

__all__ = ["causal_conv1d", "causal_conv1d_step", "check_values", "info", "symmetric_product", "use_backend"]
