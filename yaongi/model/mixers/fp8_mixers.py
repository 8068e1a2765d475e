"""Each kind of layer with its dense products in FP8: what of a mixer goes where in the layer's node."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from yaongi.model.config import PrecisionConfig
from yaongi.model.layers.fp8_layers import (
    ExpertsNode,
    Fp8Layer,
    ProjectionsNode,
    SharedExpertNode,
    Travelling,
    run_fp8,
)
from yaongi.model.layers.fp8_scales import Fp8Scales, Fp8Weight
from yaongi.model.layers.linear import DepthwiseConv, Linear
from yaongi.model.layers.norm import GatedRMSNorm, RMSNorm
from yaongi.model.layers.plain import require_plain
from yaongi.model.mixers.attention import Attention
from yaongi.model.mixers.mamba2 import Mamba2
from yaongi.model.mixers.moe import Experts, MoE, Routing, SharedExpert

Tensor = torch.Tensor
LETTERS = {"M": ("x", "y", "d", "p"), "*": ("x", "y", "d", "p"), "E": ("x", "d", "sa", "sh")}  # the sites of a layer
EXPERT_LETTERS = ("A", "dH")  # and more where the routed experts are in FP8
MIXERS: dict[str, type[nn.Module]] = {"M": Mamba2, "E": MoE, "*": Attention}
PROJECTIONS = {  # the weights of the first product, side by side, and that of the last
    "M": (("in_proj",), "out_proj"),
    "*": (("q_proj", "k_proj", "v_proj"), "o_proj"),
    "E": (("shared_experts.up_proj",), "shared_experts.down_proj"),
}


def sites_of(name: str, kind: str, precision: PrecisionConfig) -> list[str]:
    """Return the sites of a layer with FP8 products."""
    more = EXPERT_LETTERS if kind == "E" and precision.experts == "fp8" else ()
    return [f"{name} {letter}" for letter in (*LETTERS[kind], *more)]


def _float32(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))


@dataclass
class Between:
    """What lies between the two products of a layer, as its node calls it."""

    core: Callable[[Tensor], Any]
    columns: int  # of the first product that it takes
    narrow: tuple[Tensor, slice] | None = None  # a weight and its rows whose columns stay in the hidden state's dtype

    @property
    def wide(self) -> bool:
        """Whether the normalised hidden state is needed in its own dtype."""
        return self.narrow is not None

    def finish(self, projected: Tensor, x: Tensor) -> None:
        """Overwrite the columns that aren't FP8."""
        if self.narrow is not None:
            weight, rows = self.narrow
            projected[:, rows] = F.linear(x, weight[rows].to(x.dtype))

    def __call__(self, leaf: Tensor) -> Any:
        return self.core(leaf)


class Fp8Products:
    """One layer's casts of weights and its place among the sites; it holds no tensors that a checkpoint has."""

    def __init__(
        self,
        layer: Any,
        name: str,
        before: str | None,
        scales: Fp8Scales,
        travelling: Travelling,
        precision: PrecisionConfig,
    ) -> None:
        """Prepare a layer, whose weights in FP8 become float32: each is the master weight itself.

        Args:
            name: of the layer's sites.
            before: the layer before, if its output's gradient comes from this layer alone.
        """
        self._owner, self.scales = layer, scales
        self._first, self._last = PROJECTIONS[layer.kind]
        self._experts = layer.kind == "E" and precision.experts == "fp8"
        for linear in self._linears:
            linear.weight = _float32(linear.weight)
        if self._experts:
            experts = layer.mixer.experts
            experts.up_proj, experts.down_proj = _float32(experts.up_proj), _float32(experts.down_proj)
        casts = tuple(Fp8Weight() for _ in self.weights)
        self._layer = Fp8Layer(name, before, scales, travelling, casts, layer.norm.eps, precision.exact)

    @property
    def _linears(self) -> list[Any]:
        return [self._owner.mixer.get_submodule(path) for path in (*self._first, self._last)]

    @property
    def weights(self) -> tuple[list[Tensor], ...]:
        """The weights of the first product, from the top, and that of the last; then those of the routed experts."""
        *first, last = [linear.weight for linear in self._linears]
        experts = self._owner.mixer.experts if self._experts else None
        return first, [last], *([[experts.up_proj], [experts.down_proj]] if experts is not None else [])

    def refresh(self) -> None:
        """Cast the weights anew if they have changed."""
        self._layer.refresh(self.weights)

    def __call__(
        self, hidden: Tensor, document_ids: Tensor | None, attention: Any, with_routing: bool
    ) -> tuple[Tensor, Routing | None]:
        """Apply the whole layer to hidden (B, L, d), and return what follows, and the routing's measures.

        Raises:
            ValueError: something else is in the place of the mixer, a projection or a norm.
        """
        self._require_plain()
        mixer, norm, shape = self._owner.mixer, self._owner.norm, hidden.shape
        inputs = self._layer, self.weights, hidden.reshape(-1, shape[-1]), norm.weight
        own = {id(weight) for part in self.weights for weight in part}
        inside = [parameter for parameter in mixer.parameters() if id(parameter) not in own]
        if isinstance(mixer, MoE):
            node, inner = (ExpertsNode, mixer.route) if self._experts else (SharedExpertNode, mixer.core)
            out, balance, load = run_fp8(node, *inputs, lambda leaf: inner(leaf, shape[0]), inside)
            return out.view(shape), Routing(load, balance) if with_routing else None
        out = run_fp8(ProjectionsNode, *inputs, self._between(shape, document_ids, attention), inside)
        return out.view(shape), None

    def _between(self, shape: torch.Size, document_ids: Tensor | None, attention: Any) -> Between:
        mixer = self._owner.mixer
        given, narrow = attention, None
        columns = sum(len(weight) for weight in self.weights[0])
        if isinstance(mixer, Mamba2):
            given, narrow = document_ids, (mixer.in_proj.weight.detach(), slice(columns - mixer.heads, columns))
        return Between(lambda leaf: (mixer.core(leaf.unflatten(0, shape[:2]), given).flatten(0, 1),), columns, narrow)

    def _require_plain(self) -> None:
        mixer = self._owner.mixer
        where = ", where a layer runs in fp8,"
        require_plain(mixer, MIXERS[self._owner.kind], f"the mixer{where}")
        require_plain(self._owner.norm, RMSNorm, f"the norm{where}")
        for path in (*self._first, self._last):
            require_plain(mixer.get_submodule(path), Linear, f"{path}{where}")
        if isinstance(mixer, MoE):
            require_plain(mixer.experts, Experts, f"experts{where}")
            require_plain(mixer.shared_experts, SharedExpert, f"shared_experts{where}")
        if isinstance(mixer, Mamba2):
            require_plain(mixer.norm, GatedRMSNorm, f"the mixer's norm{where}")
            require_plain(mixer.conv1d, DepthwiseConv, f"conv1d{where}")
