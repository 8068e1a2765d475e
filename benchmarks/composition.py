"""The flagship composed of today's libraries as an expert user would: the peer of a complete training step.

It uses mamba_ssm's scan, `torch._grouped_mm` with a gather-sum combine, and torch's fused attention. torch.compile
handles the code around them: norms, convolution, gates, activations and residuals. It trains the parameters of a
`Yaongi` model without Engram and computes the same function (tests/model/test_composition.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from yaongi.model import Yaongi
from yaongi.model.losses import NO_TARGET, next_tokens

Tensor = torch.Tensor
Scan = Callable[..., Tensor]  # x (B, L, H, P), dt (B, L, H), A, b and c (B, L, G, N), D, dt_bias → y like x
LOSS_TOKENS = 4096  # tokens whose logits exist at once; the backward recomputes them


def mamba_ssm_scan(chunk_size: int = 256) -> Scan:
    """Return mamba_ssm's Triton scan; raise ImportError if it isn't installed."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def scan(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
        options = {"chunk_size": chunk_size, "D": D, "dt_bias": dt_bias, "dt_softplus": True}
        return mamba_chunk_scan_combined(x, dt, A, b, c, **options)

    return scan


class Composition:
    """A function from token ids (B, L) to the mean loss, on the parameters of a model."""

    def __init__(self, model: Yaongi, scan: Scan, *, compiled: bool = True) -> None:
        if model.config.engram:
            raise ValueError("composition: model must be without Engram, which no library has, got one with it")
        self._model, self._scan = model, scan
        parts = (mamba_before, mamba_after, experts, attention, chunk_loss)
        compile_ = torch.compile if compiled else lambda function: function
        self._parts: dict[str, Any] = {part.__name__: compile_(part) for part in parts}

    def __call__(self, ids: Tensor) -> Tensor:
        model, parts = self._model, self._parts
        hidden = F.embedding(ids, model.backbone.embeddings.weight)
        for layer in model.backbone.layers:
            mixer, norm = layer.mixer, layer.norm.weight
            if layer.kind == "M":
                hidden = self._mamba(hidden, norm, mixer)
            elif layer.kind == "E":
                hidden = parts["experts"](
                    hidden, norm, mixer.gate.weight, mixer.gate.e_score_correction_bias,
                    mixer.experts.up_proj, mixer.experts.down_proj,
                    mixer.shared_experts.up_proj.weight, mixer.shared_experts.down_proj.weight,
                    mixer.top_k, mixer.scale, self._eps,
                )  # fmt: skip
            else:
                weights = (p.weight for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj))
                hidden = parts["attention"](hidden, norm, *weights, mixer.head_dim, self._eps)
        targets, total = next_tokens(ids, None).flatten().long(), hidden.new_zeros((), dtype=torch.float32)
        for rows, labels in zip(hidden.flatten(0, 1).split(LOSS_TOKENS), targets.split(LOSS_TOKENS), strict=True):
            arguments = (rows, labels, model.backbone.norm_f.weight, model.lm_head.weight, self._eps)
            total = total + checkpoint(parts["chunk_loss"], *arguments, use_reentrant=False)
        return total / (targets != NO_TARGET).sum()

    @property
    def _eps(self) -> float:
        return self._model.config.norm_eps

    def _mamba(self, hidden: Tensor, norm: Tensor, mixer: Any) -> Tensor:
        z, x, b, c, dt, A = self._parts["mamba_before"](
            hidden, norm, mixer.in_proj.weight, mixer.conv1d.taps, mixer.conv1d.bias, mixer.A_log,
            mixer.heads, mixer.groups, mixer.state, self._eps,
        )  # fmt: skip
        y = self._scan(x, dt, A, b, c, mixer.D, mixer.dt_bias)
        return self._parts["mamba_after"](
            hidden, y, z, mixer.norm.weight, mixer.out_proj.weight, mixer.groups, self._eps
        )


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm with float32 statistics."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def mamba_before(
    hidden: Tensor,
    norm: Tensor,
    in_proj: Tensor,
    taps: Tensor,
    bias: Tensor,
    A_log: Tensor,
    heads: int,
    groups: int,
    state: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """Apply norm, projection, convolution as shifted sums, and silu; return the scan's inputs."""
    conv_width = taps.shape[0]
    width = conv_width - 2 * groups * state
    projected = F.linear(normed(hidden, norm, eps), in_proj)
    z, xbc, dt = projected.split([width, conv_width, heads], dim=-1)
    padded = F.pad(xbc, (0, 0, taps.shape[1] - 1, 0))
    length = hidden.shape[1]
    total = sum(padded[:, k : k + length].float() * taps[:, k].float() for k in range(taps.shape[1]))
    xbc = F.silu(total + bias.float()).to(hidden.dtype)
    x, b, c = xbc.split([width, groups * state, groups * state], dim=-1)
    A = -A_log.float().exp()
    return z, x.unflatten(-1, (heads, -1)), b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1)), dt, A


def mamba_after(
    hidden: Tensor, y: Tensor, z: Tensor, norm: Tensor, out_proj: Tensor, groups: int, eps: float
) -> Tensor:
    """Apply gate, norm over each group, projection and residual."""
    gated = (y.flatten(-2).float() * F.silu(z.float())).unflatten(-1, (groups, -1))
    scale = (gated.square().mean(-1, keepdim=True) + eps).rsqrt()
    return hidden + F.linear(((gated * scale).flatten(-2) * norm.float()).to(hidden.dtype), out_proj)


def experts(
    hidden: Tensor,
    norm: Tensor,
    gate: Tensor,
    bias: Tensor,
    up: Tensor,
    down: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
    top_k: int,
    scale: float,
    eps: float,
) -> Tensor:
    """Apply routed experts by grouped matmul, combined by a gather and a sum, and the shared expert."""
    x = normed(hidden, norm, eps).flatten(0, 1)
    scores = F.linear(x.float(), gate.float()).sigmoid()
    ids = (scores + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    weights = scale * weights / (weights.sum(-1, keepdim=True) + 1e-20)
    order = ids.flatten().argsort()
    offsets = torch.bincount(ids.flatten(), minlength=up.shape[0]).cumsum(0).int()
    rows = torch._grouped_mm(x[order // top_k], up.mT, offs=offsets).relu().square()
    rows = torch._grouped_mm(rows, down.mT, offs=offsets)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
    routed = (rows[inverse].view(*ids.shape, -1) * weights.to(x.dtype).unsqueeze(-1)).sum(1)
    shared = F.linear(F.linear(x, shared_up).relu().square(), shared_down)
    return hidden + (routed + shared).view(hidden.shape)


def attention(
    hidden: Tensor, norm: Tensor, q_proj: Tensor, k_proj: Tensor, v_proj: Tensor, o_proj: Tensor, head: int, eps: float
) -> Tensor:
    """Apply causal attention with torch's fastest kernel."""
    x = normed(hidden, norm, eps)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, head)).transpose(1, 2) for w in (q_proj, k_proj, v_proj))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return hidden + F.linear(mixed.transpose(1, 2).flatten(-2), o_proj)


def chunk_loss(rows: Tensor, labels: Tensor, norm: Tensor, head: Tensor, eps: float) -> Tensor:
    """Return Σ −log p over the tokens of a chunk that have a target."""
    logits = F.linear(normed(rows, norm, eps), head).float()
    return F.cross_entropy(logits, labels, ignore_index=NO_TARGET, reduction="sum")
