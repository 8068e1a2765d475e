"""One autograd node for a layer whose dense products run in FP8: norm, product, what lies between, product, residual.

Autograd can't carry FP8: a gradient of 8-bit floats is lost on its way from node to node. So forward and backward are
written out here, over the ops. What lies between the two products (scan, attention, routed experts) stays as it is: it
runs under autograd inside the node, and the node asks it for its gradients.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from yaongi.kernels import (
    matmul8,
    matmul8_add,
    moe8,
    moe8_backward,
    quantize8,
    rms_norm8,
    rms_norm8_backward,
    squared_relu8,
    squared_relu8_backward,
    transpose8,
)
from yaongi.model.layers.accumulation import accumulation_target
from yaongi.model.layers.fp8_scales import MULTIPLE, Fp8Scales, Fp8Weight, Site

Tensor = torch.Tensor


class Travelling:
    """A gradient in FP8, beside the one that autograd carries from a layer's node to the node before."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int, Tensor, Tensor] | None = None

    def put(self, gradient: Tensor, d8: Tensor, d8t: Tensor) -> None:
        """Keep the casts of a gradient, and the gradient, so that nothing else gets its memory."""
        self._kept = gradient, gradient._version, d8, d8t

    def take(self, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the casts if this is that gradient, unchanged; they are kept no longer."""
        kept, self._kept = self._kept, None
        if kept is None:
            return None
        same = kept[0].data_ptr() == gradient.data_ptr() and kept[0].dtype == gradient.dtype
        same = same and kept[0].numel() == gradient.numel() and gradient.is_contiguous()
        return kept[2:] if same and kept[1] == gradient._version == kept[0]._version else None


@dataclass
class Fp8Layer:
    """What the node of one layer needs besides its tensors."""

    name: str  # of the sites: layers.17
    before: str | None  # the layer before, if its gradient is this node's alone
    scales: Fp8Scales
    travelling: Travelling
    casts: tuple[Fp8Weight, ...]  # of the weights of the first and the last product; then of the experts' up and down
    eps: float
    exact: bool
    # Of one call:
    seen: bool = True  # whether casts are noted in amax
    weights: tuple[list[Tensor], ...] = ()  # those of `casts`
    targets: tuple[list[Tensor | None], ...] = ()  # the gradients to accumulate into

    @property
    def first(self) -> Fp8Weight:
        """The weights of the first product."""
        return self.casts[0]

    @property
    def last(self) -> Fp8Weight:
        """The weight of the last product."""
        return self.casts[1]

    def cast(self, letter: str, produce: Callable[[Any], Any], rehearse: Callable[[Any], object] | None = None) -> Any:
        """Return what a producer makes for the site `letter`; see `Fp8Scales.cast`."""
        return self.scales.cast(f"{self.name} {letter}", produce, seen=self.seen, rehearse=rehearse)

    def unit(self, letter: str) -> Tensor:
        """Return the unit of a site."""
        return self.scales.site(f"{self.name} {letter}").unit

    def incoming(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient of the layer's output, contiguous, and its casts in both orders."""
        gradient = gradient.contiguous()
        found = self.travelling.take(gradient)
        if found is None:
            found = self.cast("d", lambda site: quantize8(gradient, site.scale, site.amax, row=True, column=True))
        return gradient, *found

    def leave(
        self, dx: Tensor, extra: Tensor, hidden: Tensor, weight: Tensor, inverse_rms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Go back through the norm: return the gradient of `hidden`, x8 transposed, and the norm's own gradient."""
        scale_x = self.scales.site(f"{self.name} x").scale
        inputs = dx, extra, hidden, weight, inverse_rms, scale_x
        known = self.before is not None
        gradient, d8, d8t, x8t, dweight = self.scales.cast(
            f"{self.before if known else self.name} d",
            lambda site: rms_norm8_backward(*inputs, site.scale, site.amax),
            seen=known,
        )
        if known:
            self.travelling.put(gradient, d8, d8t)
        return gradient, x8t, dweight

    def weight_gradients(self, which: int, d8t: Tensor, x8t: Tensor, letters: tuple[str, str]) -> list[Tensor | None]:
        """Add the gradients of side-by-side weights to their targets; return those that have none.

        Args:
            which: 0 for the first product, 1 for the last.
            letters: the sites of d8t and x8t.
        """
        found: list[Tensor | None] = []
        start, (unit_d, unit_x) = 0, map(self.unit, letters)
        for parameter, target in zip(self.weights[which], self.targets[which], strict=True):
            rows = slice(start, start + len(parameter))
            start = rows.stop
            wide = torch.promote_types(parameter.dtype, torch.float32)
            total = torch.zeros_like(parameter, dtype=wide) if target is None else target
            matmul8_add(d8t[rows], x8t, unit_d, unit_x, total)
            found.append(total.to(parameter.dtype) if target is None else None)
        return found

    def expert_sums(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return what the gradients of the experts' weights are added to, and those of the sums that are no targets."""
        weights, targets = (list(itertools.chain(*parts[2:])) for parts in (self.weights, self.targets))
        missing = [target is None and weight.requires_grad for weight, target in zip(weights, targets, strict=True)]
        own = [torch.zeros_like(weight) if made else None for weight, made in zip(weights, missing, strict=True)]
        return [made if target is None else target for made, target in zip(own, targets, strict=True)], own

    def refresh(self, weights: Sequence[list[Tensor]]) -> None:
        """Cast the weights anew if they have changed."""
        for made, part in zip(self.casts, weights, strict=True):
            made.refresh(part)


def run_fp8(
    node: Any,
    layer: Fp8Layer,
    weights: tuple[list[Tensor], ...],
    hidden: Tensor,
    norm: Tensor,
    inner: Any,
    inside: Sequence[Tensor],
) -> Any:
    """Apply a node to hidden (T, d); without gradients only its forward pass, which leaves no trace in the scales.

    Args:
        node: one of the classes below.
        weights: those of the layer's `casts`.
        norm: (d), the norm's weight.
        inner: what lies between the products.
        inside: the parameters that `inner` uses.
    """
    layer.refresh(weights)
    seen = torch.is_grad_enabled()
    if seen and len(hidden) % MULTIPLE:
        raise ValueError(f"model: a micro-batch must be a multiple of {MULTIPLE} tokens for fp8, got {len(hidden)}")
    targets = tuple([accumulation_target(weight) for weight in part] for part in weights)
    call = replace(layer, seen=seen, weights=weights, targets=targets)
    return node.apply(hidden, norm, call, inner, *itertools.chain(*weights), *inside)


def inner_graph(inner: Any, value: Tensor, record: bool) -> tuple[Tensor, tuple[Any, ...]]:
    """Return a leaf, and the results of `inner` for it, recorded for a backward pass."""
    leaf = value.detach().requires_grad_(record)
    with torch.set_grad_enabled(record):
        return leaf, inner(leaf)


def edges_of(results: Sequence[Any]) -> list[GradientEdge | None]:
    """Return where gradients enter, which doesn't keep the results themselves; None where none flow."""
    return [get_gradient_edge(r) if isinstance(r, Tensor) and r.requires_grad else None for r in results]


def inner_gradients(
    edges: Sequence[GradientEdge | None], gradients: Sequence[Tensor | None], leaf: Tensor, inside: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the gradients of the leaf and of the parameters, some of which need none, from those of the results."""
    pairs = [(e, g) for e, g in zip(edges, gradients, strict=True) if e is not None and g is not None]
    wanted = [leaf, *(t for t in inside if t.requires_grad)]
    outputs, incoming = [e for e, _ in pairs], [g for _, g in pairs]
    first, *rest = torch.autograd.grad(outputs, wanted, incoming, allow_unused=True)
    found = iter(rest)
    return first, [next(found) if t.requires_grad else None for t in inside]


class ProjectionsNode(torch.autograd.Function):
    """hidden + last · inner(first · norm(hidden)): a Mamba-2 or an attention layer.

    `inner` is called with columns of the first product, which it may have finished from the normalised hidden state.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, norm: Tensor, layer: Fp8Layer, inner: Any, *tensors: Tensor) -> Tensor:
        inside = list(tensors[len(layer.weights[0]) + 1 :])
        x8, x, inverse_rms = layer.cast(
            "x", lambda site: rms_norm8(hidden, norm, layer.eps, site.scale, site.amax, wide=inner.wide)
        )
        options: Any = {"dtype": hidden.dtype, "exact": layer.exact}
        projected = matmul8(x8, layer.first.w8, layer.unit("x"), layer.first.unit, **options)
        inner.finish(projected, x)
        leaf, (y,) = inner_graph(inner, projected[:, : inner.columns], layer.seen)
        y8, _ = layer.cast("y", lambda site: quantize8(y.detach(), site.scale, site.amax))
        ctx.edges, ctx.leaf, ctx.inside, ctx.layer = edges_of([y]), leaf, inside, layer
        ctx.save_for_backward(hidden, norm, inverse_rms, y8)
        return matmul8(y8, layer.last.w8, layer.unit("y"), layer.last.unit, hidden, **options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, norm, inverse_rms, y8 = ctx.saved_tensors
        layer, options = ctx.layer, {"dtype": hidden.dtype, "exact": ctx.layer.exact}
        dy, d8, d8t = layer.incoming(grads[0])
        dinner = matmul8(d8, layer.last.w8t, layer.unit("d"), layer.last.unit, **options)
        dp, inside = inner_gradients(ctx.edges, [dinner], ctx.leaf, ctx.inside)
        missing = len(layer.first.w8) - dp.shape[1]
        padded = F.pad(dp, (0, missing)) if missing else dp
        p8, p8t = layer.cast("p", lambda site: quantize8(padded, site.scale, site.amax, row=True, column=True))
        dx = matmul8(p8, layer.first.w8t, layer.unit("p"), layer.first.unit, **options)
        dhidden, x8t, dnorm = layer.leave(dx, dy, hidden, norm, inverse_rms)
        last = layer.weight_gradients(1, d8t, transpose8(y8), ("d", "y"))
        return (
            dhidden,
            dnorm.to(norm.dtype),
            None,
            None,
            *layer.weight_gradients(0, p8t, x8t, ("p", "x")),
            *last,
            *inside,
        )


def shared_up(layer: Fp8Layer, hidden: Tensor, norm: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Return what `rms_norm8` makes of the hidden state, and relu(h)² of the shared expert in FP8 in both orders."""
    normed = layer.cast("x", lambda site: rms_norm8(hidden, norm, layer.eps, site.scale, site.amax, wide=True))
    units = layer.unit("x"), layer.first.unit
    h = matmul8(normed[0], layer.first.w8, *units, dtype=hidden.dtype, exact=layer.exact)
    return normed, layer.cast("sa", lambda site: squared_relu8(h, site.scale, site.amax))


def shared_back(
    layer: Fp8Layer, d8: Tensor, a8: Tensor, dtype: torch.dtype, addend: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the shared expert's gradient of x, with `addend`, and that of h in FP8, transposed."""
    options: Any = {"dtype": dtype, "exact": layer.exact}
    da = matmul8(d8, layer.last.w8t, layer.unit("d"), layer.last.unit, **options)
    unit = layer.unit("sa")
    dh8, dh8t = layer.cast("sh", lambda site: squared_relu8_backward(da, a8, unit, site.scale, site.amax))
    return matmul8(dh8, layer.first.w8t, layer.unit("sh"), layer.first.unit, addend, **options), dh8t


class SharedExpertNode(torch.autograd.Function):
    """hidden + inner(x) + last · relu(first · x)² with x = norm(hidden): an expert layer, its shared expert in FP8.

    `inner` is called with x (T, d), and returns the routed experts' output (T, d) and other results.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, norm: Tensor, layer: Fp8Layer, inner: Any, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        (_, x, inverse_rms), (a8, a8t) = shared_up(layer, hidden, norm)
        leaf, results = inner_graph(inner, x, layer.seen)
        routed, *others = results
        ctx.edges, ctx.leaf, ctx.inside, ctx.layer = edges_of(results), leaf, list(tensors[2:]), layer
        ctx.save_for_backward(hidden, norm, inverse_rms, a8, a8t)
        ctx.mark_non_differentiable(*(t for t in others if not t.is_floating_point()))
        ctx.set_materialize_grads(False)
        total = hidden + routed.detach()
        options: Any = {"dtype": hidden.dtype, "exact": layer.exact}
        out = matmul8(a8, layer.last.w8, layer.unit("sa"), layer.last.unit, total, **options)
        return out, *(t.detach() for t in others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, norm, inverse_rms, a8, a8t = ctx.saved_tensors
        layer = ctx.layer
        out = torch.zeros_like(hidden) if grads[0] is None else grads[0]
        dy, d8, d8t = layer.incoming(out)
        dleaf, inside = inner_gradients(ctx.edges, [dy, *grads[1:]], ctx.leaf, ctx.inside)
        dx, dh8t = shared_back(layer, d8, a8, hidden.dtype, dleaf)
        dhidden, x8t, dnorm = layer.leave(dx, dy, hidden, norm, inverse_rms)
        return (
            dhidden,
            dnorm.to(norm.dtype),
            None,
            None,
            *layer.weight_gradients(0, dh8t, x8t, ("sh", "x")),
            *layer.weight_gradients(1, d8t, a8t, ("d", "sa")),
            *inside,
        )


class ExpertsNode(torch.autograd.Function):
    """What `SharedExpertNode` computes, with the routed experts in FP8 too.

    `inner` is called with x (T, d), and returns the experts' weights (T, K), x again, for the experts, their ids (T, K)
    and other results.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, norm: Tensor, layer: Fp8Layer, inner: Any, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        (x8, x, inverse_rms), (a8, a8t) = shared_up(layer, hidden, norm)
        leaf, results = inner_graph(inner, x, layer.seen)
        weights, rows, ids, *others = results
        _, _, up, down = layer.casts
        operands = x8, layer.unit("x"), up.w8, down.w8, up.unit, down.unit, ids, weights.detach()
        total, routed_a8 = layer.cast(
            "A", lambda site: moe8(*operands, site.scale, site.amax, hidden, dtype=hidden.dtype)
        )
        ctx.edges, ctx.leaf, ctx.inside, ctx.layer = edges_of([weights, rows, *others]), leaf, list(tensors[4:]), layer
        ctx.save_for_backward(hidden, norm, inverse_rms, a8, a8t, routed_a8, ids, weights.detach())
        ctx.mark_non_differentiable(*(t for t in others if not t.is_floating_point()))
        ctx.set_materialize_grads(False)
        options: Any = {"dtype": hidden.dtype, "exact": layer.exact}
        out = matmul8(a8, layer.last.w8, layer.unit("sa"), layer.last.unit, total, **options)
        return out, *(t.detach() for t in others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, norm, inverse_rms, a8, a8t, routed_a8, ids, weights = ctx.saved_tensors
        layer = ctx.layer
        dy, d8, d8t = layer.incoming(torch.zeros_like(hidden) if grads[0] is None else grads[0])
        dshared, dh8t = shared_back(layer, d8, a8, hidden.dtype)
        _, _, up, down = layer.casts
        operands = d8, layer.unit("d"), dy, ctx.leaf.detach(), up.w8t, down.w8t, up.unit, down.unit, ids, weights
        saved = routed_a8, layer.unit("A")
        sums, own = layer.expert_sums()

        def back(site: Site, dw_up: Tensor | None = None, dw_down: Tensor | None = None) -> tuple[Tensor, ...]:
            return moe8_backward(*operands, *saved, site.scale, site.amax, dshared, dw_up, dw_down)

        dx, dweights, _ = layer.cast("dH", lambda site: back(site, *sums), rehearse=back)
        dx, inside = inner_gradients(ctx.edges, [dweights, dx, *grads[1:]], ctx.leaf, ctx.inside)
        dhidden, x8t, dnorm = layer.leave(dx, dy, hidden, norm, inverse_rms)
        return (
            dhidden,
            dnorm.to(norm.dtype),
            None,
            None,
            *layer.weight_gradients(0, dh8t, x8t, ("sh", "x")),
            *layer.weight_gradients(1, d8t, a8t, ("d", "sa")),
            *own,
            *inside,
        )
