"""The expert mixer: routed squared-ReLU experts and one shared expert."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from yaongi.kernels import linear_step, moe, moe_route, moe_step
from yaongi.kernels.moe_step.op import MOST_TOKENS
from yaongi.model.config import ModelConfig
from yaongi.model.layers.accumulation import accumulation_target
from yaongi.model.layers.compiled import compiled
from yaongi.model.layers.linear import Linear, add_linear, fork, is_step
from yaongi.model.layers.plain import is_plain, require_plain
from yaongi.model.mixers.router import Router, correction_bias, sequence_balance

Tensor = torch.Tensor
Dispatch = Callable[[Callable[[Tensor, Tensor, Tensor], Tensor], Tensor, Tensor, Tensor], Tensor]


class Routing(NamedTuple):
    """Measures of one layer's routing, for the trainer."""

    load: Tensor  # (E,) int32, tokens that each expert got
    balance: Tensor  # scalar, the sequence balance loss averaged over the rows, unweighted


class Experts(nn.Module):
    """The weights of all experts of a layer: up (E, F, d), down (E, d, F)."""

    def __init__(self, config: ModelConfig, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        count, width, hidden = config.experts, config.hidden_size, config.expert_size
        self.up_proj = nn.Parameter(torch.empty(count, hidden, width, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(count, width, hidden, device=device, dtype=dtype))


class SharedExpert(nn.Module):
    """down(relu(up(x))²) for every token, added to the output of the routed experts."""

    def __init__(self, config: ModelConfig, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.shared_expert_size
        self.up_proj = Linear(width, hidden, device, dtype)
        self.down_proj = Linear(hidden, width, device, dtype)

    def up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return relu(up(x))² for x (T, d), and x again for the routed experts; see `Linear.fork`."""
        if is_step(x) and is_plain(self.up_proj, Linear):
            return linear_step(x, self.up_proj.weight.to(x.dtype), activation="squared_relu"), x
        h, x = fork(self.up_proj, x)
        return compiled(_squared_relu, h.device.type)(h), x

    def down(self, a: Tensor, into: Tensor) -> Tensor:
        """Return down(a), added to `into` (T, d), where possible in place."""
        return add_linear(self.down_proj, a, into)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, d) to (T, d); `up` and `down` do it in two halves, with the routed experts between them."""
        return self.down_proj(self.up(x)[0])


def _squared_relu(h: Tensor) -> Tensor:  # compiled, the fastest of three variants (docs/LAB.md)
    return h.relu().square()


class MoE(nn.Module):
    """The weighted sum of the outputs of a token's K experts, plus the output of the shared expert."""

    def __init__(self, config: ModelConfig, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.top_k, self.scale = config.experts_per_token, config.routed_scale
        self.gate = Router(config, device, dtype)
        self.experts = Experts(config, device, dtype)
        self.shared_experts = SharedExpert(config, device, dtype)
        self.dispatch: Dispatch | None = None  # set where other processes hold a part of the experts

    def forward(self, x: Tensor, with_routing: bool = False) -> tuple[Tensor, Routing | None]:
        """Map (B, L, d) to (B, L, d); also return the routing's measures if `with_routing`.

        Raises:
            ValueError: something else is in the routed experts' place, or a gate without a correction bias.
        """
        require_plain(self.experts, Experts, "experts")
        rows = x.reshape(-1, x.shape[-1])
        logits, rows = self._logits(rows)
        if self._is_short_step(rows):
            y, ids, load = self._stepped(rows, logits)
        else:
            shared = is_plain(self.shared_experts, SharedExpert)
            a, rows = self.shared_experts.up(rows) if shared else (rows, rows)
            y, ids, load = self._routed(rows, logits)
            y = self.shared_experts.down(a, y) if shared else y + self.shared_experts(rows)
        return y.view(x.shape), Routing(load, self._balance(logits, ids, x.shape[0])) if with_routing else None

    def core(self, rows: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Map (T, d), the tokens of `batch` rows, to the routed experts' sum (T, d), the balance loss and the load."""
        require_plain(self.experts, Experts, "experts")
        logits, rows = self._logits(rows)
        y, ids, load = self._routed(rows, logits)
        return y, self._balance(logits, ids, batch), load

    def route(self, rows: Tensor, batch: int) -> tuple[Tensor, ...]:
        """Return what `core` does but for the experts: their weights (T, K), `rows` again, and their ids (T, K)."""
        logits, rows = self._logits(rows)
        ids, weights, load = self._choice(logits)
        return weights, rows, ids, self._balance(logits, ids, batch), load

    def _logits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the router's logits, and the rows again for the experts."""
        return self.gate.fork(rows) if is_plain(self.gate, Router) else (self.gate(rows), rows)

    def _is_short_step(self, rows: Tensor) -> bool:
        """Return whether `moe_step` can do the work: few tokens, no gradients, and only the model's own weights."""
        if not is_step(rows) or rows.shape[0] > MOST_TOKENS or self.dispatch is not None:
            return False
        shared = self.shared_experts
        plain = is_plain(shared, SharedExpert) and all(is_plain(m, Linear) for m in (shared.up_proj, shared.down_proj))
        return plain and all(w.dtype == rows.dtype for w in (self.experts.up_proj, shared.up_proj.weight))

    def _stepped(self, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of routed and shared experts (T, d), the routed ones (T, K), and their tokens (E)."""
        ids, weights, load = self._choice(logits)
        routed, shared = self.experts, self.shared_experts
        matrices = routed.up_proj, routed.down_proj, shared.up_proj.weight, shared.down_proj.weight
        return moe_step(rows, *matrices, ids, weights, settled=True), ids, load

    def _routed(self, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the routed experts' sum (T, d), the experts (T, K), and the tokens that each expert got (E)."""
        ids, weights, load = self._choice(logits)
        up, down = self.experts.up_proj, self.experts.down_proj
        dw_up, dw_down = accumulation_target(up), accumulation_target(down)
        sums = None if dw_up is None or dw_down is None else (dw_up, dw_down)
        narrow = up.to(rows.dtype), down.to(rows.dtype)  # float32 where FP8 is trained

        def experts(rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return moe(rows, *narrow, ids, weights, weight_gradients=sums)

        y = experts(rows, ids, weights) if self.dispatch is None else self.dispatch(experts, rows, ids, weights)
        return y, ids, load

    def _choice(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the experts (T, K), their weights (T, K), and the tokens that each expert got (E)."""
        bias = correction_bias(self.gate).to(logits.dtype)
        return moe_route(logits, bias, self.top_k, self.scale)

    def _balance(self, logits: Tensor, ids: Tensor, batch: int) -> Tensor:
        balance = compiled(sequence_balance, logits.device.type)
        return balance(logits.unflatten(0, (batch, -1)), ids.unflatten(0, (batch, -1)))
