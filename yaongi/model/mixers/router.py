"""The router: float32 logits computed on tensor cores, and the sequence balance loss."""

from typing import Any

import torch
from torch import nn

from yaongi.kernels import linear_step
from yaongi.model.config import ModelConfig
from yaongi.model.layers.accumulation import accumulation_target
from yaongi.model.layers.compiled import compiled, on_gpu
from yaongi.model.layers.float32 import KeepsFloat32
from yaongi.model.layers.linear import is_step

Tensor = torch.Tensor


class Router(KeepsFloat32):
    """The experts' logits in float32, and the correction bias, which affects only the choice of experts."""

    FLOAT32 = ("e_score_correction_bias",)

    def __init__(self, config: ModelConfig, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden_size, device=device, dtype=dtype))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.experts, device=device, dtype=wide))
        self.e_score_correction_bias: Tensor

    def reset_constants(self) -> None:
        """Set the correction bias to zero."""
        self.e_score_correction_bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, d) to logits (T, E)."""
        if is_step(x) and x.dtype == self.weight.dtype:
            return linear_step(x, self.weight, wide=True, settled=True)
        if self._on_tensor_cores(x):
            return RouterProduct.apply(x, self.weight)[0]
        wide = torch.promote_types(x.dtype, torch.float32)
        return nn.functional.linear(x.to(wide), self.weight.to(wide))

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, and x again for the experts; see `Linear.fork`."""
        if self._on_tensor_cores(x) and accumulation_target(self.weight) is not None:
            return RouterProduct.apply(x, self.weight)
        return self(x), x

    def _on_tensor_cores(self, x: Tensor) -> bool:
        return on_gpu(x) and x.dtype == torch.bfloat16 == self.weight.dtype


def correction_bias(gate: nn.Module) -> Tensor:
    """Return a gate's correction bias (E,), whatever module the gate is. Raises ValueError if it has none."""
    bias = getattr(gate, "e_score_correction_bias", None)
    if not isinstance(bias, Tensor):
        raise ValueError(f"model: gate must have e_score_correction_bias, got a {type(gate).__name__} without one")
    return bias


def balance_direction(loads: Tensor) -> Tensor:
    """Return s − mean(s) with s = sign(mean load − load), (layers, E) float64: where the correction biases move.

    The choice of experts depends on differences of biases alone, so their mean stays where it is. Otherwise it would
    drift, for most experts are below the mean load, and a bfloat16 copy of the biases would lose their differences.

    Args:
        loads: (layers, E), the tokens that each expert got.
    """
    loads = loads.double()
    signs = (loads.mean(1, keepdim=True) - loads).sign()
    return signs - signs.mean(1, keepdim=True)


class RouterProduct(torch.autograd.Function):
    """x·Wᵀ of bfloat16 operands with a float32 result, on tensor cores in both directions.

    Tensor cores multiply bfloat16 exactly and add in float32. The backward pass splits the float32 gradient into three
    bfloat16 parts (24 bits in all) side by side, so that each of its products is one product over 3·E.

    x is returned too. The gradient that comes back through this output is added within the product, in place, so it
    must not alias another tensor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return torch.mm(x, weight.T, out_dtype=torch.float32), x

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if dlogits is None:
            return dx, None
        x, weight = ctx.saved_tensors
        split = compiled(split_into_bf16, dlogits.device.type)(dlogits)
        dweight = torch.mm(split.T, x, out_dtype=torch.float32).unflatten(0, (3, -1)).sum(0)
        thrice = weight.repeat(3, 1)
        return split @ thrice if dx is None else dx.addmm_(split, thrice), dweight


def split_into_bf16(t: Tensor) -> Tensor:
    """Split (T, E) float32 into (T, 3·E) bfloat16: three parts of eight bits each that add up to it exactly.

    A mask cuts the bits off. Rounding by a cast would not do: torch.compile removes a cast to bfloat16 and back, so the
    remainder would be zero.
    """
    rest, parts = t, []
    for _ in range(3):
        parts.append((rest.view(torch.int32) & -(1 << 16)).view(torch.float32))
        rest = rest - parts[-1]
    return torch.cat(parts, dim=1).bfloat16()


def sequence_balance(logits: Tensor, expert_ids: Tensor) -> Tensor:
    """Return the sequence balance loss: Σ_e f_e·P_e of each row, averaged over the rows; 1 when balanced.

    f_e is E/(K·L) times the number of the row's tokens that chose expert e. P_e is the row's mean of the scores,
    normalised over E. The gradient flows through P only.

    Args:
        logits: (B, L, E).
        expert_ids: (B, L, K) int32, the experts of each token.
    """
    _, length, experts = logits.shape
    top_k = expert_ids.shape[-1]
    chosen = expert_ids.flatten(1).unsqueeze(-1) == torch.arange(experts, device=logits.device)
    share = chosen.sum(1) * (experts / (top_k * length))
    # σ / Σσ as a softmax of log σ: far below 0 every score, and with them their sum, would be zero.
    probability = nn.functional.logsigmoid(logits).softmax(-1).mean(1)
    return (share * probability).sum(-1).mean()
