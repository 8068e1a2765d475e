"""Prompts read into caches, and what goes on: `prefill`, `read_on`, `step`, and the step recorded as a CUDA graph."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from yaongi.model.check import check_tokens
from yaongi.model.engram.engram import EngramCache
from yaongi.model.engram.hashing import ngram_window
from yaongi.model.layers.cuda_graph import GraphedFunction
from yaongi.model.layers.plain import any_hooks
from yaongi.model.mixers.attention import AttentionCache
from yaongi.model.mixers.attention_backends import CachedAttention, ContinuedAttention
from yaongi.model.mixers.mamba2 import MambaCache
from yaongi.model.model import Context, Yaongi

Tensor = torch.Tensor
SHORTEST = 256  # places that a step on a GPU attends to at first, then twice as many; those after its own are masked


@dataclass
class LayerCache:
    """The state of one layer between steps; an expert layer has none."""

    mixer: MambaCache | AttentionCache | None
    engram: EngramCache | None


@dataclass
class Cache:
    """The state of the model between steps."""

    layers: list[LayerCache]
    visible: Tensor  # (B, capacity) bool, the positions read so far that belong to each row's last document
    position: int  # tokens read so far, padding included; of rows that differ the most
    place: Tensor  # (B,) int64, the same of each row, where the model is; capacity − 1 once the row is full
    steps: Tensor  # (B,) int64, the steps of each row since the last prompt was read into it
    tail: Tensor | None  # (B, n − 1) int64, the last compressed ids, newest first; None without Engram

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values; float32 without attention layers."""
        kept = (layer.mixer.keys for layer in self.layers if isinstance(layer.mixer, AttentionCache))
        return next((keys.dtype for keys in kept if keys is not None), torch.float32)

    @property
    def capacity(self) -> int:
        """Tokens that the caches of the attention layers have room for."""
        return self.visible.shape[1]

    def grow(self, capacity: int) -> None:
        """Make room for at least so many tokens."""
        more = capacity - self.capacity
        if more <= 0:
            return
        self.visible = torch.nn.functional.pad(self.visible, (0, more))
        for layer in self.layers:
            if isinstance(layer.mixer, AttentionCache):
                layer.mixer.grow(capacity)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, integers (R,), in this order; a row may be taken several times."""
        self.visible, self.place, self.steps = self.visible[rows], self.place[rows], self.steps[rows]
        self.tail = None if self.tail is None else self.tail[rows]
        for layer in self.layers:
            if layer.mixer is not None:
                layer.mixer.select(rows)
            if layer.engram is not None:
                layer.engram.select(rows)
                layer.engram.steps = self.steps

    def first(self, rows: int) -> "Cache":
        """Return the first rows, in the same memory."""
        steps, layers = self.steps[:rows], []
        for layer in self.layers:
            mixer = None if layer.mixer is None else layer.mixer.first(rows)
            phases = None if layer.engram is None or layer.engram.phases is None else layer.engram.phases[:rows]
            layers.append(LayerCache(mixer, None if layer.engram is None else EngramCache(steps, phases)))
        tail = None if self.tail is None else self.tail[:rows]
        return Cache(layers, self.visible[:rows], self.position, self.place[:rows], steps, tail)

    def put(self, rows: Tensor, other: "Cache", lengths: Tensor) -> None:
        """Copy another cache to rows (R,) of this one: of each the last `lengths` tokens (R,), all of its document."""
        self.visible.index_copy_(0, rows, torch.arange(self.capacity, device=rows.device) < lengths.unsqueeze(1))
        self.place.index_copy_(0, rows, lengths)
        self.steps.index_copy_(0, rows, other.steps)
        if self.tail is not None and other.tail is not None:
            self.tail.index_copy_(0, rows, other.tail)
        for own, new in zip(self.layers, other.layers, strict=True):
            if isinstance(own.mixer, AttentionCache) and isinstance(new.mixer, AttentionCache):
                own.mixer.put(rows, new.mixer, lengths, other.position)
            elif isinstance(own.mixer, MambaCache) and isinstance(new.mixer, MambaCache):
                own.mixer.put(rows, new.mixer)
            if own.engram is not None and new.engram is not None:
                own.engram.put(rows, new.engram)


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
    hidden, cache = read(model, input_ids, document_ids, capacity=capacity)
    return model.lm_head(hidden[:, -1:])[:, 0], cache


def read(
    model: Yaongi,
    input_ids: Tensor,
    document_ids: Tensor | None = None,
    *,
    capacity: int,
    most_documents: int | None = None,
) -> tuple[Tensor, Cache]:
    """Do what `prefill` does, but return the normalised hidden states of all tokens, (B, L, d).

    Where no row has more than `most_documents`, nothing waits for the GPU: this may be recorded.
    """
    check_tokens(input_ids, document_ids, model.config.vocab_size)
    batch, length = input_ids.shape
    if length > capacity:
        raise ValueError(f"prefill: input_ids must be at most {capacity} tokens long (capacity), got {length}")
    cache = _empty_cache(model, batch, capacity, input_ids.device)
    context = model.backbone.context(input_ids, document_ids, most_documents)
    hidden, _ = model.backbone(input_ids, context, caches=cache.layers)
    cache.visible[:, :length] = True if document_ids is None else document_ids == document_ids[:, -1:]
    cache.position = length
    cache.place.fill_(length)
    if context.window is not None:
        cache.tail = context.window[:, :-1, -1].clone()
    return hidden, cache


@torch.no_grad()
def read_on(model: Yaongi, input_ids: Tensor, cache: Cache) -> Tensor:
    """Read more tokens of each row, (B, L), and return their normalised hidden states, (B, L, d).

    All rows must be at one position, as they are after a prefill.
    """
    length = input_ids.shape[1]
    if length == 1:
        return step_hidden(model, input_ids[:, 0], cache).unsqueeze(1)
    check_tokens(input_ids, None, model.config.vocab_size)
    start, end = cache.position, cache.position + length
    if end > cache.capacity:
        raise ValueError(f"read_on: input_ids must be at most {cache.capacity - start} tokens long, got {length}")
    backbone, window, attention = model.backbone, None, None
    if cache.tail is not None:
        known = cache.tail.flip(1)
        ids = torch.cat([known, backbone.compress(input_ids)], dim=1)
        window = ngram_window(ids, None, backbone.longest, backbone.engram_pad)[:, :, known.shape[1] :]
        cache.tail.copy_(window[:, :-1, -1])
    cache.visible[:, start:end] = True
    if "*" in model.config.pattern:
        causal = torch.ones(length, end, dtype=torch.bool, device=input_ids.device).tril(start)
        attention = ContinuedAttention(start, cache.visible[:, None, None, :end] & causal)
    hidden, _ = backbone(input_ids, Context(None, attention, window), caches=cache.layers)
    cache.position = end
    cache.place.fill_(end)
    cache.steps.zero_()
    return hidden


@torch.no_grad()
def step(model: Yaongi, tokens: Tensor, cache: Cache) -> Tensor:
    """Read one more token of each row, (B,) integers, and return the logits of the token after it, (B, V)."""
    return model.lm_head(step_hidden(model, tokens, cache).unsqueeze(1))[:, 0]


@torch.no_grad()
def step_hidden(model: Yaongi, tokens: Tensor, cache: Cache) -> Tensor:
    """Do what `step` does, but return the normalised hidden states, (B, d)."""
    _check_room(cache)
    length = _attended(cache) if tokens.device.type == "cuda" else cache.position + 1
    check_tokens(tokens.unsqueeze(-1), None, model.config.vocab_size)
    hidden = _advance(model, tokens, cache, length)
    cache.position += 1
    return hidden


class RecordedStep:
    """`step` on a GPU, recorded as a CUDA graph: a call is one launch, and the GPU never waits for Python.

    A graph attends to a fixed number of places. When they are read, a new one of twice as many is recorded: the first
    step of that length runs as usual, the second one is recorded. The graphs are kept: rows may end and others begin.
    """

    def __init__(self, model: Yaongi, cache: Cache) -> None:
        self._model, self._cache = model, cache
        self._graphed: dict[int, Callable[[Tensor], None]] = {}
        self._logits: list[Tensor] = []  # one, once a step has been done

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Do what `step` does; the logits are valid until the next call."""
        _check_room(self._cache)
        length = _attended(self._cache)
        if length not in self._graphed:
            run = partial(_step_into, self._model, self._cache, length, self._logits)  # not self: that would be a cycle
            self._graphed[length] = GraphedFunction(run, "a step", "generate without cuda_graph")
        self._graphed[length](tokens)
        self._cache.position += 1
        return self._logits[0]


def stepper(model: Yaongi, cache: Cache, *, cuda_graph: bool) -> Callable[[Tensor], Tensor]:
    """Return a function that does a `step` with these caches, recorded where that is possible and wanted."""
    if cuda_graph and may_be_recorded(model, cache):
        return RecordedStep(model, cache)
    return lambda tokens: step(model, tokens, cache)


def may_be_recorded(model: Yaongi, cache: Cache) -> bool:
    """Return whether what a model does with these caches may be recorded as a CUDA graph.

    Hooks are Python, which a graph would run only once: a model that has some is not recorded. Neither is one with a
    part on another device, such as a table in host memory, nor one with experts in float32: their kernels take 16 bits,
    and their reference waits for the GPU.
    """
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    waits = "E" in model.config.pattern and cache.dtype.itemsize != 2
    return len(places) == 1 and next(iter(places)).type == "cuda" and not any_hooks(model) and not waits


def _check_room(cache: Cache) -> None:
    if cache.position >= cache.capacity:
        raise ValueError(f"step: position must be below {cache.capacity} (capacity), got {cache.position}")


def _attended(cache: Cache) -> int:
    """Return how many places the next step attends to on a GPU: SHORTEST, doubled until its own is among them."""
    length = SHORTEST
    while length <= cache.position:
        length *= 2
    return min(length, cache.capacity)


def _step_into(model: Yaongi, cache: Cache, length: int, result: list[Tensor], tokens: Tensor) -> None:
    """Put the logits of `step` into the tensor that the list holds, or that the first call puts there."""
    logits = model.lm_head(_advance(model, tokens, cache, length).unsqueeze(1))[:, 0]
    if not result:
        result.append(torch.empty_like(logits))
    result[0].copy_(logits)


def _advance(model: Yaongi, tokens: Tensor, cache: Cache, length: int) -> Tensor:
    """Read a token of each row, (B, d), changing only tensors, in place: this may be recorded."""
    backbone, window = model.backbone, None
    if cache.tail is not None:
        window = torch.cat([backbone.compress(tokens).unsqueeze(-1), cache.tail], dim=1).unsqueeze(-1)
        cache.tail.copy_(window[:, :-1, 0])
    cache.visible.scatter_(1, cache.place.unsqueeze(1), True)
    attention = CachedAttention(cache.place, cache.visible, length)
    hidden, _ = backbone(tokens.unsqueeze(-1), Context(None, attention, window), caches=cache.layers)
    cache.place.add_(1).clamp_(max=cache.capacity - 1)
    cache.steps.add_(1)
    return hidden[:, 0]


def _empty_cache(model: Yaongi, batch: int, capacity: int, device: torch.device) -> Cache:
    config = model.config
    place, steps = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
    engrams = {engram.layer for engram in config.engram}
    layers = []
    for i, kind in enumerate(config.pattern):
        mixer: MambaCache | AttentionCache | None = None
        if kind == "M":
            mixer = MambaCache()
        elif kind == "*":
            mixer = AttentionCache(capacity)
        layers.append(LayerCache(mixer, EngramCache(steps) if i in engrams else None))
    visible = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
    return Cache(layers, visible, 0, place, steps, None)
