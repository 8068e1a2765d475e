"""The norms as modules around `yaongi.kernels`."""

import torch
from torch import nn

from yaongi.kernels import gated_rms_norm, rms_norm
from yaongi.model.layers.plain import is_plain

Tensor = torch.Tensor


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, statistics in float32."""

    def __init__(self, width: int, eps: float, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (…, width)."""
        return rms_norm(x, self.weight, self.eps)

    def add_and_norm(self, hidden: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden + delta and its norm, in one pass."""
        normed, total = rms_norm(delta, self.weight, self.eps, hidden)
        return total, normed


def add_and_norm(norm: nn.Module, hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return hidden + delta and its norm; for no delta, hidden itself and its norm."""
    if delta is not None and is_plain(norm, RMSNorm):
        return norm.add_and_norm(hidden, delta)  # type: ignore[operator]
    hidden = hidden if delta is None else hidden + delta
    return hidden, norm(hidden)


class GatedRMSNorm(nn.Module):
    """x·silu(z), divided by its root mean square in each of `groups` groups of channels, times the weight."""

    def __init__(self, width: int, groups: int, eps: float, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Gate and normalise x with z, both (…, width)."""
        return gated_rms_norm(x, z, self.weight, self.eps, self.groups)
