"""The complete model: `Yaongi`, its layers, and the losses and updates for training."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike
from torch import nn
from torch.utils.checkpoint import checkpoint

from yaongi.model.check import check_targets, check_tokens, compression_table
from yaongi.model.config import ModelConfig
from yaongi.model.count import ParameterCounts, count_parameters
from yaongi.model.engram.engram import Engram
from yaongi.model.engram.hashing import hash_plans, ngram_window
from yaongi.model.hub import folder as hub
from yaongi.model.hub.checkpoint_folders import find_weights
from yaongi.model.initialize import initialize, set_constants
from yaongi.model.layers.fp8_layers import Travelling
from yaongi.model.layers.fp8_scales import Fp8Scales
from yaongi.model.layers.linear import Embedding, Linear
from yaongi.model.layers.norm import RMSNorm, add_and_norm
from yaongi.model.layers.plain import is_plain
from yaongi.model.losses import (
    Losses,
    TokenLosses,
    head_cross_entropy,
    head_token_losses,
    module_cross_entropy,
    module_token_losses,
    next_tokens,
)
from yaongi.model.mixers.attention import Attention
from yaongi.model.mixers.attention_backends import AttentionPlan, CachedAttention, ContinuedAttention, plan_attention
from yaongi.model.mixers.fp8_mixers import Fp8Products, sites_of
from yaongi.model.mixers.mamba2 import Mamba2
from yaongi.model.mixers.moe import MoE, Routing
from yaongi.model.mixers.router import balance_direction

Tensor = torch.Tensor
Recompute = Literal["none", "all"] | Sequence[int]
MIXERS: dict[str, Callable[..., nn.Module]] = {"M": Mamba2, "E": MoE, "*": Attention}


@dataclasses.dataclass(frozen=True)
class Context:
    """Inputs that all layers of one forward pass, or of one step of generation, share."""

    document_ids: Tensor | None  # (B, L) int32
    attention: AttentionPlan | CachedAttention | ContinuedAttention | None  # None without attention layers
    window: Tensor | None  # (B, n, L) int64, compressed ids of the n-gram that ends at each token; None without Engram
    with_routing: bool = False


class Layer(nn.Module):
    """One mixer with one pre-norm and one residual connection; where the config says so, an Engram before it.

    The hidden state passes between layers as two tensors, `hidden` and `delta`, whose sum it is. The next norm does the
    addition in its own kernel, which reads both tensors anyway.
    """

    def __init__(
        self, config: ModelConfig, index: int, engram: Engram | None, device: torch.device | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.kind = config.pattern[index]
        self.engram = engram
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, device, dtype)
        self.mixer: Any = MIXERS[self.kind](config, device, dtype)
        self.fp8: Fp8Products | None = None  # set where the dense products run in FP8

    def forward(
        self, hidden: Tensor, delta: Tensor | None, context: Context, cache: Any = None
    ) -> tuple[Tensor, Tensor | None, Routing | None]:
        """Apply the layer.

        Args:
            hidden: (B, L, d).
            delta: (B, L, d), still to be added to `hidden`; None for zero.
            cache: a `LayerCache` (decoding.py) to fill, or a filled one to continue.

        Returns:
            `hidden` and `delta` after this layer, and the routing's measures if the layer has experts.
        """
        if self.engram is not None:
            hidden = hidden if delta is None else hidden + delta
            engram_cache = None if cache is None else cache.engram
            delta = self.engram(hidden, context.window, context.document_ids, engram_cache)
        if self.fp8 is not None and self.fp8.scales.enabled and cache is None:
            hidden = hidden if delta is None else hidden + delta
            out, routing = self.fp8(hidden, context.document_ids, context.attention, context.with_routing)
            return out, None, routing
        hidden, normed = add_and_norm(self.norm, hidden, delta)
        mixer_cache = None if cache is None else cache.mixer
        if self.kind == "M":
            return hidden, self.mixer(normed, context.document_ids, mixer_cache), None
        if self.kind == "*":
            return hidden, self.mixer(normed, context.attention, mixer_cache), None
        return hidden, *self.mixer(normed, context.with_routing)


class Backbone(nn.Module):
    """Everything but the head: token ids to normalised hidden states."""

    def __init__(self, config: ModelConfig, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embedding(config.vocab_size, config.hidden_size, device, dtype)
        compressed = config.compressed_vocab_size or config.vocab_size
        plans = zip(config.engram, hash_plans(config.engram, compressed), strict=True)
        engrams = {e.layer: Engram(config, e, plan, device, dtype) for e, plan in plans}
        self.layers = nn.ModuleList(Layer(config, i, engrams.get(i), device, dtype) for i in range(len(config.pattern)))
        self.norm_f = RMSNorm(config.hidden_size, config.norm_eps, device, dtype)
        self.fp8_scales = self._use_fp8(device)
        self.longest = max((max(e.orders) for e in config.engram), default=0)
        self.compression: Tensor | None
        if config.engram and config.compressed_vocab_size is not None:
            self.register_buffer("compression", torch.zeros(config.vocab_size, dtype=torch.int64, device=device))
        else:
            self.compression = None

    def _use_fp8(self, device: torch.device | None) -> Fp8Scales | None:
        """Give the layers that the config's precision names FP8 products, and return the scales, if there are any."""
        precision, pattern = self.config.precision, self.config.pattern
        chosen = precision.layers(pattern)
        if not chosen:
            return None
        sites = [site for i in chosen for site in sites_of(f"layers.{i}", pattern[i], precision)]
        scales, travelling = Fp8Scales(sites, precision.margin, precision.history, device), Travelling()
        for i in chosen:
            layer: Any = self.layers[i]
            alone = i - 1 in chosen and layer.engram is None
            before = f"layers.{i - 1}" if alone else None
            layer.fp8 = Fp8Products(layer, f"layers.{i}", before, scales, travelling, precision)
        return scales

    def context(
        self, ids: Tensor, document_ids: Tensor | None, most_documents: int | None = None, *, with_routing: bool = False
    ) -> Context:
        """Prepare the inputs that the layers share, for these tokens; no row has more than `most_documents`."""
        plan = None
        if "*" in self.config.pattern:
            wanted, dtype = self.config.attention_backend, next(self.parameters()).dtype
            plan = plan_attention(wanted, ids.shape, document_ids, ids.device, dtype, most_documents)
        window = None
        if self.longest:
            window = ngram_window(self.compress(ids), document_ids, self.longest, self.engram_pad)
        return Context(document_ids, plan, window, with_routing)

    def compress(self, ids: Tensor) -> Tensor:
        """Map token ids to Engram's ids, int64; without a compression map they stay the same."""
        return ids.long() if self.compression is None else self.compression[ids]

    @property
    def engram_pad(self) -> int:
        """The compressed id that stands for positions before a document, V_c."""
        return self.config.compressed_vocab_size or self.config.vocab_size

    def forward(
        self, input_ids: Tensor, context: Context, recompute: Recompute = "none", caches: Sequence[Any] | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """Turn ids (B, L) into hidden states (B, L, d); also return each expert layer's routing if `with_routing`.

        Args:
            caches: a cache for each layer, for `Layer.forward`.
        """
        hidden: Tensor = self.embeddings(input_ids)
        delta: Tensor | None = None
        routings: list[Routing] = []
        for i, layer in enumerate(self.layers):
            if recompute == "all" or (recompute != "none" and i in recompute):
                hidden = hidden if delta is None else hidden + delta  # so that one tensor is saved, not two
                hidden, delta, routing = checkpoint(
                    layer, hidden, None, context, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden, delta, routing = layer(hidden, delta, context, None if caches is None else caches[i])
            if routing is not None:
                routings.append(routing)
        return add_and_norm(self.norm_f, hidden, delta)[1], routings


class Yaongi(nn.Module):
    """The language model. `model(input_ids, document_ids=None)` gives logits.

    Args:
        config: the architecture.
        seed: seed of the initial weights, which are the same on any number of devices (see initialize.py).
        device: None for torch's default; on the meta device the weights get no values.
        dtype: dtype of the weights, float32 by default. A_log, D, dt_bias and the correction bias are at least float32.
        compression: (V,) integers, `compression_map` of the tokenizer's pieces, for the Engrams; it sets the
            config's `compressed_vocab_size`. Without it Engram hashes the token ids themselves (the identity map).

    Attributes:
        recompute: the layers whose activations are recomputed in the backward pass: "none", "all" or indices.

    Raises:
        ValueError: the compression does not fit the config, or is missing although the config needs one.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compression: ArrayLike | None = None,
    ) -> None:
        super().__init__()
        place = None if device is None else torch.device(device)
        dtype = dtype or torch.float32
        table = None if compression is None or not config.engram else compression_table(compression, config)
        if table is not None:
            config = dataclasses.replace(config, compressed_vocab_size=int(table.max()) + 1)
        self.config = config
        self.recompute: Recompute = "none"
        self.backbone = Backbone(config, place, dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, place, dtype)
        buffer = self.backbone.compression
        if buffer is not None and not buffer.is_meta:
            if table is None:
                size = config.compressed_vocab_size
                raise ValueError(f"Yaongi: compression must be given for compressed_vocab_size = {size}, got none")
            buffer.copy_(table)
        initialize(self, config, seed)

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Return the logits of the next token.

        Args:
            input_ids: (B, L) int64 or int32.
            document_ids: (B, L) int32, not decreasing within a row: attention, Mamba state, convolutions and n-grams
                start from scratch where the id changes.

        Returns:
            (B, L, V) in the model's dtype.

        Raises:
            TypeError: an argument has a wrong dtype.
            ValueError: an argument has a wrong shape; on the CPU also for an id outside the vocabulary.
        """
        return self.lm_head(self._hidden(input_ids, document_ids, with_routing=False)[0])

    def hidden_states(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Return what the head reads: the normalised hidden states (B, L, d); arguments as in `forward`."""
        return self._hidden(input_ids, document_ids, with_routing=False)[0]

    def loss(self, input_ids: Tensor, document_ids: Tensor | None = None, *, targets: Tensor | None = None) -> Tensor:
        """Return the mean loss in nats over the targets, 0 if there are none; arguments as in `losses`."""
        hidden, _ = self._hidden(input_ids, document_ids, with_routing=False)
        labels = self._labels(input_ids, document_ids, targets)
        total, _ = self._cross_entropy(hidden, labels)
        return total / (labels >= 0).sum().clamp(min=1)

    def losses(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        upstream: tuple[Tensor, Tensor] | None = None,
    ) -> Losses:
        """Return the sums that a training step accumulates over micro-batches; arguments and errors as in `forward`.

        Args:
            targets: (B, L) int64, the id to predict at each token; NO_TARGET or any other negative number (−100, say)
                where there is none. By default the next token of the same document.
            upstream: the gradients with which a backward pass will come to the first two sums, if they are known: it is
                faster then (`head_cross_entropy`).
        """
        hidden, routings = self._hidden(input_ids, document_ids, with_routing=True)
        labels = self._labels(input_ids, document_ids, targets)
        total, squares = self._cross_entropy(hidden, labels, upstream)
        balance, loads = self._routed(routings, total)
        return Losses(total, squares, balance, (labels >= 0).sum(), loads)

    def token_losses(self, input_ids: Tensor, document_ids: Tensor | None, *, targets: Tensor) -> TokenLosses:
        """Return the loss of each token, with a gradient; arguments and errors as in `losses`."""
        hidden, routings = self._hidden(input_ids, document_ids, with_routing=True)
        rows, labels = hidden.flatten(0, 1), self._labels(input_ids, document_ids, targets)
        if is_plain(self.lm_head, Linear):
            losses = head_token_losses(rows, self.lm_head.weight, labels)
        else:
            losses = module_token_losses(rows, self.lm_head, labels, self.config.vocab_size)
        return TokenLosses(losses.view_as(targets), *self._routed(routings, losses))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> "Yaongi":
        """Load the model of a folder: Hugging Face's `nemotron_h`, one that `save_pretrained` wrote, or a run's.

        Of a run it is the newest checkpoint, of which only the weights are loaded, or the folder of any checkpoint.
        Besides the model, memory holds at most one shard.

        Args:
            dtype: dtype of the model's weights; None for that of the folder.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the config is not one of this model, a tensor is missing, extra or has a wrong shape, or a file
                is damaged.
        """
        folder = find_weights(Path(folder))
        config, stored = hub.read_config(folder)
        model = cls(config, device="meta", dtype=dtype or stored).to_empty(device=device)
        with torch.no_grad():
            set_constants(model)
            hub.read_weights(folder, model.state_dict())
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model into a folder, in its own dtype.

        Without Engram this is the hub's `nemotron_h` layout. With Engram it is our own `yaongi` layout, which keeps
        everything and which transformers loads with trust_remote_code.

        Raises:
            ValueError: the model has other tensors than its config says, such as an adapter's.
        """
        self.check_tensors()
        hub.save(self, self.config, self.count_parameters(), Path(folder))

    def check_tensors(self) -> None:
        """Raise ValueError if the model has other tensors than its config says: no folder could hold them."""
        wanted, found = Yaongi(self.config, device="meta").state_dict().keys(), self.state_dict().keys()
        other = next((name for name in [*found, *wanted] if (name in wanted) != (name in found)), None)
        if other is not None:
            got = "the extra" if other in found else "none of"
            raise ValueError(f"save_pretrained: tensors must be those of the config, got {got} {other}")

    @property
    def fp8_scales(self) -> Fp8Scales | None:
        """The scales of the FP8 casts; None where the config's precision has no FP8."""
        return self.backbone.fp8_scales

    def fp8_weights(self) -> list[Tensor]:
        """Return the weights that training multiplies in FP8, which are float32 or wider."""
        return [weight for fp8 in self._fp8_products() for part in fp8.weights for weight in part]

    def refresh_fp8(self) -> None:
        """Cast those weights anew where they have changed; call it before a recorded micro-batch is replayed."""
        for fp8 in self._fp8_products():
            fp8.refresh()

    def _fp8_products(self) -> list[Fp8Products]:
        layers: Any = self.backbone.layers
        return [layer.fp8 for layer in layers if layer.fp8 is not None]

    def count_parameters(self) -> ParameterCounts:
        """Count the parameters: total, active and by part; works on the meta device too."""
        return count_parameters(self, self.config)

    @torch.no_grad()
    def update_router_bias(self, loads: Tensor, rate: float = 1e-3) -> None:
        """Do correction bias += rate · `balance_direction(loads)`; call it once per optimizer step.

        Args:
            loads: (expert layers, E), integers: the tokens that each expert got in the global batch.
        """
        layers = [module for module in self.modules() if isinstance(module, MoE)]
        if tuple(loads.shape) != (len(layers), self.config.experts):
            wanted = (len(layers), self.config.experts)
            raise ValueError(f"update_router_bias: loads must be {wanted}, got {tuple(loads.shape)}")
        for mixer, change in zip(layers, rate * balance_direction(loads), strict=True):
            bias = mixer.gate.e_score_correction_bias
            bias.add_(change.to(bias))

    def _routed(self, routings: list[Routing], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the balance loss and the loads of `Losses`."""
        if routings:
            balance = torch.stack([routing.balance for routing in routings]).sum()
            return balance, torch.stack([routing.load for routing in routings])
        return like.new_zeros(()), like.new_zeros((0, self.config.experts), dtype=torch.int32)

    def _labels(self, input_ids: Tensor, document_ids: Tensor | None, targets: Tensor | None) -> Tensor:
        """Return the targets (B·L); those of the next tokens if none are given."""
        if targets is None:
            return next_tokens(input_ids, document_ids).flatten().long()
        check_targets(targets, input_ids, self.config.vocab_size)
        return targets.flatten()

    def _cross_entropy(
        self, hidden: Tensor, targets: Tensor, upstream: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of the cross entropy and of logsumexp² over the targets (B·L)."""
        rows = hidden.flatten(0, 1)
        if is_plain(self.lm_head, Linear):
            return head_cross_entropy(rows, self.lm_head.weight, targets, upstream=upstream)
        return module_cross_entropy(rows, self.lm_head, targets, self.config.vocab_size)

    def _hidden(
        self, input_ids: Tensor, document_ids: Tensor | None, *, with_routing: bool
    ) -> tuple[Tensor, list[Routing]]:
        check_tokens(input_ids, document_ids, self.config.vocab_size)
        context = self.backbone.context(input_ids, document_ids, with_routing=with_routing)
        return self.backbone(input_ids, context, self.recompute)
