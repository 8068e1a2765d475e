"""The composed reference of a layer in FP8: plain autograd, with casts whose gradient passes straight through."""

from typing import Any

import torch
from moe8_support import Scales, cast_weight, experts8
from moe8_support import cast as cast_by

from yaongi.model import Yaongi
from yaongi.model.layers.fp8_scales import Site
from yaongi.model.model import Layer

Tensor = torch.Tensor
FP8 = {"mamba_projections": "fp8", "attention_projections": "fp8", "shared_experts": "fp8", "high_layers": ()}
EXPERTS = FP8 | {"experts": "fp8"}
SIZES = {
    "hidden_size": 32,
    "mamba_heads": 4,
    "mamba_head_dim": 8,
    "attention_head_dim": 8,
    "shared_expert_size": 16,
    "expert_size": 48,
}


def cast(values: Tensor, site: Site) -> Tensor:
    """What a tensor is after its cast to FP8 and back."""
    return cast_by(values, site.scale)


class Product(torch.autograd.Function):
    """x·wᵀ of casts; the gradient is cast too, once for both products of the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, site: Site, gradient: Site) -> Tensor:
        x, w = cast(x, site), cast_weight(w)
        ctx.save_for_backward(x, w)
        ctx.site = gradient
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        d = cast(grads[0], ctx.site)
        return d @ w, d.T @ x, None, None


class SquaredRelu(torch.autograd.Function):
    """relu(h)², whose derivative is that of its cast."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, site: Site) -> Tensor:
        a = h.relu().square()
        ctx.save_for_backward(cast(a, site))
        return a

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (a,) = ctx.saved_tensors
        return 2 * a.sqrt() * grads[0], None


def routed_experts(mixer: Any, x: Tensor, batch: int, sites: dict[str, Site]) -> tuple[Tensor, Tensor]:
    """Return the routed experts' sum (T, d), in FP8 where there are sites for it, and the balance loss."""
    if "A" not in sites:
        return mixer.core(x, batch)[:2]
    weights, x, ids, balance, _ = mixer.route(x, batch)
    scales = Scales(*(sites[letter].scale for letter in ("x", "A", "d", "dH")))
    return experts8(x, mixer.experts.up_proj, mixer.experts.down_proj, ids, weights, scales), balance


def composed(model: Yaongi, layer: Layer, hidden: Tensor, context: Any) -> tuple[Tensor, Tensor | None]:
    """Return what follows a layer with FP8 products, (B, L, d), and its balance loss."""
    shape, rows, mixer = hidden.shape, hidden.flatten(0, 1), layer.mixer
    scales: Any = model.backbone.fp8_scales
    index = [*model.backbone.layers].index(layer)
    sites = {name.split()[1]: scales.site(name) for name in scales.sites if name.split()[0] == f"layers.{index}"}
    x = layer.norm(rows)
    if layer.kind == "E":
        routed, balance = routed_experts(mixer, x, shape[0], sites)
        shared = mixer.shared_experts
        h = Product.apply(x, shared.up_proj.weight, sites["x"], sites["sh"])
        a = SquaredRelu.apply(h, sites["sa"])
        return (rows + routed + Product.apply(a, shared.down_proj.weight, sites["sa"], sites["d"])).view(shape), balance
    if layer.kind == "M":
        projected = Product.apply(x, mixer.in_proj.weight, sites["x"], sites["p"])
        heads = mixer.heads
        dt = x @ mixer.in_proj.weight[-heads:].T  # forwards as it is, backwards as the rest
        dt = projected[:, -heads:] + (dt - projected[:, -heads:]).detach()
        projected = torch.cat([projected[:, :-heads], dt], dim=1)
        y = mixer.core(projected.view(*shape[:2], -1), context.document_ids)
        last = mixer.out_proj.weight
    else:
        weight = torch.cat([p.weight for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)])
        projected = Product.apply(x, weight, sites["x"], sites["p"])
        y = mixer.core(projected.view(*shape[:2], -1), context.attention)
        last = mixer.o_proj.weight
    return (rows + Product.apply(y.flatten(0, 1), last, sites["y"], sites["d"])).view(shape), None
