"""Text generation: a prefill that fills the caches of every layer, steps of one token, and sampling.

Prompts of unequal length are padded on the left. The padding is a separate document, so attention, Mamba state,
convolutions and n-grams start from scratch at each prompt, and an answer does not depend on the rest of the batch.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from yaongi.model.engram.engram import EngramCache
from yaongi.model.mixers.attention import AttentionCache
from yaongi.model.mixers.mamba2 import MambaCache
from yaongi.model.model import Layer, Yaongi, check_tokens

Tensor = torch.Tensor


@dataclass
class LayerCache:
    """The state of one layer between steps; an expert layer has none."""

    mixer: MambaCache | AttentionCache | None
    engram: EngramCache | None


@dataclass
class Cache:
    """The state of the model between steps."""

    layers: list[LayerCache]
    visible: Tensor  # (B, capacity) bool, the positions that belong to each row's last document
    position: int  # tokens read so far, padding included
    tail: Tensor | None  # (B, n − 1) int64, the last compressed ids, newest first; None without Engram

    @property
    def capacity(self) -> int:
        """Tokens that the caches of the attention layers have room for."""
        return self.visible.shape[1]


@torch.no_grad()
def prefill(
    model: Yaongi, input_ids: Tensor, document_ids: Tensor | None = None, *, capacity: int
) -> tuple[Tensor, Cache]:
    """Read the prompts; `step` then continues the last document of each row.

    Args:
        input_ids: (B, L).
        document_ids: (B, L) int32, as in the model's `forward`.
        capacity: tokens to make room for, prompts included.

    Returns:
        The logits of the next token (B, V), and the cache for `step`.
    """
    check_tokens(input_ids, document_ids, model.config.vocab_size)
    length = input_ids.shape[1]
    if length > capacity:
        raise ValueError(f"prefill: input_ids must be at most {capacity} tokens long (capacity), got {length}")
    backbone = model.backbone
    cache = _empty_cache(model, input_ids.shape[0], capacity, input_ids.device)
    context = backbone.context(input_ids, document_ids)
    hidden, delta = backbone.embeddings(input_ids), None
    for layer, layer_cache in zip(backbone.layers, cache.layers, strict=True):
        hidden, delta, _ = layer(hidden, delta, context, layer_cache)
    cache.visible[:, :length] = True if document_ids is None else document_ids == document_ids[:, -1:]
    cache.visible[:, length:] = True
    cache.position = length
    if context.window is not None:
        cache.tail = context.window[:, :-1, -1]
    last = backbone.norm_f.add_and_norm(hidden[:, -1], None if delta is None else delta[:, -1])[1]
    return model.lm_head(last), cache


@torch.no_grad()
def step(model: Yaongi, tokens: Tensor, cache: Cache) -> Tensor:
    """Read one more token of each row, (B,) integers, and return the logits of the token after it, (B, V)."""
    if cache.position >= cache.capacity:
        raise ValueError(f"step: position must be below {cache.capacity} (capacity), got {cache.position}")
    check_tokens(tokens.unsqueeze(-1), None, model.config.vocab_size)
    backbone, window = model.backbone, None
    if cache.tail is not None:
        window = torch.cat([backbone.compress(tokens).unsqueeze(-1), cache.tail], dim=1).unsqueeze(-1)
        cache.tail = window[:, :-1, 0]
    hidden, delta = backbone.embeddings(tokens), None
    layers = cast(Iterable[Layer], backbone.layers)
    for layer, layer_cache in zip(layers, cache.layers, strict=True):
        hidden, delta = layer.step(hidden, delta, window, layer_cache, cache.position, cache.visible)
    cache.position += 1
    return model.lm_head(backbone.norm_f.add_and_norm(hidden, delta)[1])


def generate(
    model: Yaongi,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Return the continuation of each prompt, without the stop token that ended it.

    Args:
        prompts: token ids; each prompt has at least one.
        temperature: 0 takes the likeliest token, 1 samples from the model's distribution.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the likeliest tokens that together have this probability.
        stop: tokens that end an answer; by default those of the model's config.
        seed: seed of the sampling.

    Raises:
        ValueError: a prompt is empty, an id is outside the vocabulary, a prompt and its answer may exceed the model's
            max_sequence_length, or a setting is out of range.
    """
    _check_settings(model, prompts, max_new_tokens, temperature, top_k, top_p)
    ends = set(model.config.answer_ends if stop is None else stop)
    device = model.lm_head.weight.device
    input_ids, document_ids = _padded(prompts, model.config.pad_token_id, device)
    logits, cache = prefill(model, input_ids, document_ids, capacity=input_ids.shape[1] + max_new_tokens)
    random = torch.Generator(device).manual_seed(seed)
    answers: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for count in range(max_new_tokens):
        chosen = choose(logits, temperature, top_k, top_p, random)
        for row, token in enumerate(chosen.tolist()):
            running[row] = running[row] and token not in ends
            if running[row]:
                answers[row].append(token)
        if not any(running) or count == max_new_tokens - 1:
            break
        logits = step(model, chosen, cache)
    return answers


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, random: torch.Generator
) -> Tensor:
    """Choose a token for each row of logits (B, V): (B,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ranked, order = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = ranked.cumsum(-1) - ranked >= top_p  # False for the likeliest token
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=random).squeeze(-1)


def _empty_cache(model: Yaongi, batch: int, capacity: int, device: torch.device) -> Cache:
    config, dtype = model.config, model.lm_head.weight.dtype
    shape = (batch, config.attention_kv_heads, capacity, config.attention_head_dim)
    layers = []
    for layer in model.backbone.layers:
        mixer: MambaCache | AttentionCache | None = None
        if layer.kind == "M":
            mixer = MambaCache()
        elif layer.kind == "*":
            mixer = AttentionCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
        layers.append(LayerCache(mixer, None if layer.engram is None else EngramCache([])))
    return Cache(layers, torch.zeros(batch, capacity, dtype=torch.bool, device=device), 0, None)


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the prompts (B, L), padded on the left, and document ids: 0 for padding, 1 for text (None: no padding)."""
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    input_ids = torch.tensor(rows, dtype=torch.int64, device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return input_ids, None
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    places = torch.arange(longest, device=device)
    return input_ids, (places >= longest - lengths[:, None]).int()


def _check_settings(
    model: Yaongi,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    def require(condition: bool, rule: str, got: object) -> None:
        if not condition:
            raise ValueError(f"generate: {rule}, got {got}")

    limit, vocab_size = model.config.max_sequence_length, model.config.vocab_size
    require(len(prompts) >= 1, "prompts must be at least one", "none")
    require(all(len(prompt) >= 1 for prompt in prompts), "every prompt must be at least one token", "an empty one")
    bad = next((token for prompt in prompts for token in prompt if not 0 <= token < vocab_size), None)
    require(bad is None, f"token ids must be 0 to {vocab_size - 1}", bad)
    require(max_new_tokens >= 1, "max_new_tokens must be 1 or more", max_new_tokens)
    room, longest = limit - max_new_tokens, max(map(len, prompts))
    rule = f"prompts must be at most {room} tokens long ({limit} less the {max_new_tokens} to generate)"
    require(longest <= room, rule, longest)
    require(temperature >= 0, "temperature must be 0 or more", temperature)
    require(top_k is None or top_k >= 1, "top_k must be 1 or more", top_k)
    require(top_p is None or 0 < top_p <= 1, "top_p must be above 0 and at most 1", top_p)
