"""The core of a Mamba-2 mixer from the kernels of its three ops, which read and write slices in place."""

from collections.abc import Callable
from typing import Any

import torch

from yaongi.kernels.causal_conv1d.conv_backward import causal_conv1d_backward_triton
from yaongi.kernels.causal_conv1d.conv_forward import causal_conv1d_triton
from yaongi.kernels.mamba_core.reference import composed, split_convolved, split_projected
from yaongi.kernels.mamba_scan import scan_backward as scan
from yaongi.kernels.mamba_scan.reverse_walk import fill_gradients_cuda
from yaongi.kernels.mamba_scan.scan_forward import mamba_scan_triton
from yaongi.kernels.rms_norm import norm_kernels as norm

Tensor = torch.Tensor


mamba_core_triton = composed(causal_conv1d_triton, mamba_scan_triton, norm.gated_rms_norm_triton)


def _backward(
    fill_scan_gradients: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    dy: Tensor,
    xbc: Tensor,
    scanned: Tensor,
    projected: Tensor,
    taps: Tensor,
    taps_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    document_ids: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Write each gradient into its columns of dprojected."""
    if not projected.numel():
        dtaps, dtaps_bias, dweight = (t.new_zeros(t.shape, dtype=torch.float32) for t in (taps, taps_bias, weight))
        dprojected, dA, dD, ddt_bias = (torch.zeros_like(t) for t in (projected, A, D, dt_bias))
        return dprojected, dtaps, dtaps_bias, dA, dD, ddt_bias, dweight
    gradients_of = (projected, xbc, scanned)
    dprojected, dxbc, dscanned = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in gradients_of)
    z, conv_in, dt = split_projected(projected, A, weight)
    dz, dconv_in, ddt = split_projected(dprojected, A, weight)
    x, b, c = split_convolved(xbc, A, weight, groups)
    dx, db, dc = split_convolved(dxbc, A, weight, groups)
    dweight = norm.fill_gradients(dy, None, scanned, z, weight, eps, groups, dscanned, dz)
    dA, dD, ddt_bias, _ = fill_scan_gradients(
        scan.Gradients(dx, ddt, db, dc), dscanned.view(x.shape), None, x, dt, A, b, c, D, dt_bias, document_ids, None
    )
    _, dtaps, dtaps_bias, _ = causal_conv1d_backward_triton(
        dxbc, None, conv_in, taps, taps_bias, document_ids, None, "silu", dconv_in
    )
    return dprojected, dtaps, dtaps_bias, dA, dD, ddt_bias, dweight


def mamba_core_backward_triton(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute what `mamba_core_backward_reference` does."""
    return _backward(scan.fill_gradients, *arguments)


def mamba_core_backward_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute what `mamba_core_backward_reference` does, with the scan's reverse walk in CUDA."""
    return _backward(fill_gradients_cuda, *arguments)
