"""The public ops of Open-Yaongi."""

from yaongi.kernels.attention_step.op import attention_step
from yaongi.kernels.backend import check_values, info, unavailable, use_backend
from yaongi.kernels.causal_conv1d.op import causal_conv1d, causal_conv1d_step
from yaongi.kernels.cross_entropy.op import cross_entropy, cross_entropy_backward
from yaongi.kernels.fp8_quantize.op import (
    quantize8,
    quantize_weight8,
    squared_relu8,
    squared_relu8_backward,
    transpose8,
)
from yaongi.kernels.fp8_quantize.reference import power_of_two_scale
from yaongi.kernels.likeliest.op import likeliest
from yaongi.kernels.linear_step.op import linear_step, linear_steps
from yaongi.kernels.mamba_core.op import mamba_core
from yaongi.kernels.mamba_scan.op import mamba_scan, mamba_step
from yaongi.kernels.matmul8.op import matmul8, matmul8_add
from yaongi.kernels.moe.op import moe, moe_route
from yaongi.kernels.moe8.op import moe8, moe8_backward
from yaongi.kernels.moe_step.op import moe_step
from yaongi.kernels.newton_schulz.op import newton_schulz, teon_update
from yaongi.kernels.newton_schulz.reference import teon_direction, teon_weight
from yaongi.kernels.rms_norm.op import gated_rms_norm, rms_norm, rms_norm8, rms_norm8_backward
from yaongi.kernels.symmetric_product.op import symmetric_product

__all__ = [
    "attention_step",
    "causal_conv1d",
    "causal_conv1d_step",
    "check_values",
    "cross_entropy",
    "cross_entropy_backward",
    "gated_rms_norm",
    "info",
    "likeliest",
    "linear_step",
    "linear_steps",
    "mamba_core",
    "mamba_scan",
    "mamba_step",
    "matmul8",
    "matmul8_add",
    "moe",
    "moe8",
    "moe8_backward",
    "moe_route",
    "moe_step",
    "newton_schulz",
    "power_of_two_scale",
    "quantize8",
    "quantize_weight8",
    "rms_norm",
    "rms_norm8",
    "rms_norm8_backward",
    "squared_relu8",
    "squared_relu8_backward",
    "symmetric_product",
    "teon_direction",
    "teon_update",
    "teon_weight",
    "transpose8",
    "unavailable",
    "use_backend",
]
