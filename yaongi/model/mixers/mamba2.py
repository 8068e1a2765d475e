"""The Mamba-2 mixer: projection, causal convolution, scan, gated norm, projection."""

from dataclasses import dataclass

import torch
from torch import nn

from yaongi.kernels import causal_conv1d, causal_conv1d_step, mamba_core, mamba_scan, mamba_step
from yaongi.model.config import ModelConfig
from yaongi.model.layers.float32 import KeepsFloat32
from yaongi.model.layers.linear import DepthwiseConv, Linear
from yaongi.model.layers.norm import GatedRMSNorm
from yaongi.model.layers.plain import is_plain, require_plain

Tensor = torch.Tensor


@dataclass
class MambaCache:
    """The state of one layer between generation steps; the prefill fills it."""

    conv: Tensor | None = None  # (B, H·P + 2·G·N, taps − 1)
    state: Tensor | None = None  # (B, H, P, N), float32
    rates: Tensor | None = None  # (H), A, which a step would otherwise compute again

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.conv is not None and self.state is not None:
            self.conv, self.state = self.conv[rows], self.state[rows]

    def first(self, rows: int) -> "MambaCache":
        """Return the first rows, in the same memory."""
        assert self.conv is not None
        assert self.state is not None
        return MambaCache(self.conv[:rows], self.state[:rows], self.rates)

    def put(self, rows: Tensor, other: "MambaCache") -> None:
        """Copy another cache to rows of this one."""
        for own, new in ((self.conv, other.conv), (self.state, other.state)):
            assert own is not None
            assert new is not None
            own.index_copy_(0, rows, new)


class Mamba2(KeepsFloat32):
    """h_t = exp(δ_t·A)·h_{t−1} + δ_t·x_t ⊗ b_t, y_t = h_t·c_t + D·x_t, δ = softplus(dt + dt_bias) without a clamp.

    The rows of `in_proj` are z, x, B, C, dt, in this order. `A_log`, `D` and `dt_bias` are at least float32.
    """

    FLOAT32 = ("A_log", "D", "dt_bias")

    def __init__(self, config: ModelConfig, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        heads, width, conv_width = config.mamba_heads, config.mamba_width, config.conv_width
        self.heads, self.groups, self.state = heads, config.mamba_groups, config.mamba_state
        self.splits = [width, conv_width, heads]  # z, (x, B, C), dt
        self.in_proj = Linear(config.hidden_size, sum(self.splits), device, dtype)
        self.conv1d = DepthwiseConv(conv_width, config.mamba_conv, device, dtype, bias=True)
        self.A_log = nn.Parameter(torch.empty(heads, device=device, dtype=wide))
        self.D = nn.Parameter(torch.empty(heads, device=device, dtype=wide))
        self.dt_bias = nn.Parameter(torch.empty(heads, device=device, dtype=wide))
        self.norm = GatedRMSNorm(width, config.mamba_groups, config.norm_eps, device, dtype)
        self.out_proj = Linear(width, config.hidden_size, device, dtype)

    def forward(self, x: Tensor, document_ids: Tensor | None, cache: MambaCache | None = None) -> Tensor:
        """Map (B, L, d) to (B, L, d), and fill the cache with the state after the last token.

        A cache that is filled already is continued: by one token, x (B, 1, d), in place.

        Raises:
            ValueError: something else is in the convolution's place.
        """
        require_plain(self.conv1d, DepthwiseConv, "conv1d")
        if cache is not None and cache.state is not None and x.shape[1] == 1:
            return self._step(x, cache)
        projected = self.in_proj(x)
        if cache is None and is_plain(self.norm, GatedRMSNorm):
            return self.out_proj(self.core(projected, document_ids))
        z, xbc, dt = projected.split(self.splits, dim=-1)
        taps, bias, rates = self.conv1d.taps, self.conv1d.bias, self._rates()
        conv, state = (None, None) if cache is None else (cache.conv, cache.state)
        xbc, conv = causal_conv1d(
            xbc, taps, bias, document_ids=document_ids, initial_state=conv, return_final_state=True
        )
        operands = self._operands(xbc, dt, rates)
        y, state = mamba_scan(*operands, document_ids=document_ids, initial_state=state, return_final_state=True)
        if cache is not None:
            cache.conv, cache.state, cache.rates = conv, state, rates
        return self.out_proj(self.norm(y.flatten(-2), z))

    def core(self, projected: Tensor, document_ids: Tensor | None) -> Tensor:
        """Map in_proj's output to out_proj's input: convolution, scan and gated norm, (B, L, H·P)."""
        return mamba_core(
            projected,
            self.conv1d.taps,
            self.conv1d.bias,  # type: ignore[arg-type]  # this convolution has one
            self._rates(),
            self.D,
            self.dt_bias,
            self.norm.weight,
            groups=self.groups,
            eps=self.norm.eps,
            document_ids=document_ids,
        )

    def _step(self, x: Tensor, cache: MambaCache) -> Tensor:
        """Map the next token (B, 1, d) to (B, 1, d), and update the filled cache in place."""
        assert cache.conv is not None
        assert cache.state is not None
        assert cache.rates is not None
        z, xbc, dt = self.in_proj(x).split(self.splits, dim=-1)
        xbc = causal_conv1d_step(xbc.squeeze(1), cache.conv, self.conv1d.taps, self.conv1d.bias)
        y = mamba_step(cache.state, *self._operands(xbc, dt.squeeze(1), cache.rates))
        return self.out_proj(self.norm(y.flatten(-2).unsqueeze(1), z))

    def _operands(self, xbc: Tensor, dt: Tensor, rates: Tensor) -> tuple[Tensor, ...]:
        """Return x, dt, A, b, c, D and dt_bias in the shapes that the scan takes."""
        group_width = self.groups * self.state
        x, b, c = xbc.split([self.splits[0], group_width, group_width], dim=-1)
        heads, groups = (self.heads, -1), (self.groups, -1)
        x, b, c = x.unflatten(-1, heads), b.unflatten(-1, groups), c.unflatten(-1, groups)
        return x, dt, rates, b, c, self.D, self.dt_bias

    def _rates(self) -> Tensor:
        """Return A (H,), negative, at least float32."""
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()
