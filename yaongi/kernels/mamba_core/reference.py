"""The core of a Mamba-2 mixer, composed of the references of its three ops; README.md explains it."""

from collections.abc import Callable

import torch

from yaongi.kernels.causal_conv1d.reference import causal_conv1d_backward_reference, causal_conv1d_reference
from yaongi.kernels.mamba_scan.reference import mamba_scan_backward_reference, mamba_scan_reference
from yaongi.kernels.rms_norm.reference import gated_rms_norm_backward_reference, gated_rms_norm_reference

Tensor = torch.Tensor


def split_projected(projected: Tensor, A: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the columns of z, of x, b and c together, and of dt."""
    heads, width = A.shape[0], weight.shape[0]
    return projected.split([width, projected.shape[-1] - width - heads, heads], dim=-1)


def split_convolved(xbc: Tensor, A: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (B, L, H, P), and b and c (B, L, G, N)."""
    heads, width = A.shape[0], weight.shape[0]
    projection = (xbc.shape[-1] - width) // 2
    x, b, c = xbc.split([width, projection, projection], dim=-1)
    return x.unflatten(-1, (heads, -1)), b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))


def composed(
    conv: Callable[..., tuple[Tensor, Tensor]], scan: Callable[..., tuple[Tensor, Tensor]], norm: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return the op's forward, composed of three parts that are all references or all kernel launchers."""

    def forward(
        projected: Tensor,  # (B, L, 2·H·P + 2·G·N + H)
        taps: Tensor,  # (H·P + 2·G·N, W)
        taps_bias: Tensor,  # (H·P + 2·G·N)
        A: Tensor,  # (H)
        D: Tensor,  # (H)
        dt_bias: Tensor,  # (H)
        weight: Tensor,  # (H·P)
        document_ids: Tensor | None,  # (B, L)
        groups: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # (B, L, H·P); the convolution's output; (B, L, H·P), the scan's
        """Run convolution, scan and gated norm; the last two results are saved for the backward."""
        z, xbc, dt = split_projected(projected, A, weight)
        xbc, _ = conv(xbc, taps, taps_bias, document_ids, None, "silu", False)
        x, b, c = split_convolved(xbc, A, weight, groups)
        scanned, _ = scan(x, dt, A, b, c, D, dt_bias, document_ids, None, False)
        scanned = scanned.flatten(-2)
        return norm(scanned, z, weight, eps, groups), xbc, scanned

    return forward


mamba_core_reference = composed(causal_conv1d_reference, mamba_scan_reference, gated_rms_norm_reference)


def mamba_core_backward_reference(
    dy: Tensor,  # (B, L, H·P)
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
    """Return the gradients of projected, taps, taps_bias, A, D, dt_bias and weight; taps' and weight's unrounded."""
    z, conv_in, dt = split_projected(projected, A, weight)
    x, b, c = split_convolved(xbc, A, weight, groups)
    dscanned, dz, dweight = gated_rms_norm_backward_reference(dy, scanned, z, weight, eps, groups)
    dx, ddt, dA, db, dc, dD, ddt_bias, _ = mamba_scan_backward_reference(
        dscanned.view(x.shape), None, x, dt, A, b, c, D, dt_bias, document_ids, None
    )
    dxbc = torch.cat([t.flatten(-2) for t in (dx, db, dc)], dim=-1)
    dconv_in, dtaps, dtaps_bias, _ = causal_conv1d_backward_reference(
        dxbc, None, conv_in, taps, taps_bias, document_ids, None, "silu"
    )
    return torch.cat([dz, dconv_in, ddt], dim=-1), dtaps, dtaps_bias, dA, dD, ddt_bias, dweight
