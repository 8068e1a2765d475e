"""Text generation: prompts are read, then a token of each row is chosen and read, until every row has ended.

Prompts of unequal length are padded on the left. The padding is a separate document, so attention, Mamba state,
convolutions and n-grams start from scratch at each prompt, and an answer does not depend on the rest of the batch. Nor
does its sampling: the random numbers of a row come from the seed and its prompt.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from yaongi.model.decoding import prefill, stepper
from yaongi.model.model import Yaongi
from yaongi.model.sampling import Sampling, choose, penalise, row_uniforms
from yaongi.model.text_stream import TextStream

Tensor = torch.Tensor
EVEN = 64  # capacities are multiples of it: attention kernels would pad the mask of others at every step
Until = Callable[[int, int], bool]  # (row, its new token) → whether the row ends with it


def generate(
    model: Yaongi,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Collection[int] | None = None,
    seed: int = 0,
    cuda_graph: bool = True,
) -> list[list[int]]:
    """Return the continuation of each prompt, without the stop token that ended it.

    Args:
        prompts: token ids; each prompt has at least one.
        temperature: 0 takes the likeliest token, 1 samples from the model's distribution.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the likeliest tokens that together have this probability.
        repetition_penalty: divides positive logits of tokens of prompt and answer, and multiplies negative ones.
        stop: tokens that end an answer; by default those of the model's config.
        seed: seed of the sampling. Seed and prompt give the same answer in any batch; equal prompts in one batch give
            different ones.
        cuda_graph: on a GPU, record a step and replay it; not done for a model with hooks.

    Raises:
        ValueError: a prompt is empty, an id is outside the vocabulary, a prompt and its answer may exceed the model's
            max_sequence_length, a setting is out of range, or the model's logits are not numbers.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(
        model, prompts, sampling, max_new_tokens=max_new_tokens, stop=stop, seed=seed, cuda_graph=cuda_graph
    ):
        for answer, token in zip(answers, tokens, strict=True):
            if token is not None:
                answer.append(token)
    return answers


def stream(
    model: Yaongi,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int = 128,
    stop: Collection[int] | None = None,
    seed: int = 0,
    until: Until | None = None,
    cuda_graph: bool = True,
) -> Iterator[list[int | None]]:
    """Yield the new token of each row as it comes, None for a row that has ended; arguments as in `generate`.

    Args:
        until: asked with each row and its new token whether the row ends with it.
    """
    _check_prompts(model, prompts, max_new_tokens)
    ends = set(model.config.answer_ends if stop is None else stop)
    device = next(model.parameters()).device
    input_ids, document_ids = padded(prompts, model.config.pad_token_id, device)
    capacity = even_capacity(input_ids.shape[1] + max_new_tokens)
    logits, cache = prefill(model, input_ids, document_ids, capacity=capacity)
    advance = stepper(model, cache, cuda_graph=cuda_graph)
    sampler = _Sampler(prompts, sampling, seed, max_new_tokens, logits)
    running = [True] * len(prompts)
    for count in range(max_new_tokens):
        chosen = sampler(logits)
        copied = Copied(chosen)
        ahead = _runs_ahead(device) and count < max_new_tokens - 1
        if ahead:
            logits = advance(chosen.clamp(min=0))
        tokens = copied.numbers()
        if -1 in tokens:
            raise ValueError(f"generate: logits must be finite numbers, got others in row {tokens.index(-1)}")
        running = [alive and token not in ends for alive, token in zip(running, tokens, strict=True)]
        shown = [token if alive else None for alive, token in zip(running, tokens, strict=True)]
        if until is not None:
            running = [alive and not until(row, tokens[row]) for row, alive in enumerate(running)]
        yield shown
        if not any(running) or count == max_new_tokens - 1:
            return
        if not ahead:
            logits = advance(chosen)


def stream_text(
    model: Yaongi,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    decode: Callable[[Sequence[int]], str],
    *,
    stop: Collection[int] | None = None,
    stop_strings: Sequence[str] = (),
    max_new_tokens: int = 128,
    seed: int = 0,
    cuda_graph: bool = True,
) -> Iterator[tuple[int, str]]:
    """Yield (row, more of its answer's text) as it comes: whole characters, and an end before any stop string.

    Args:
        decode: the text of token ids, of the model's tokenizer.
        stop: tokens that end an answer; by default those of the model's config.
    """
    texts = [TextStream(decode, stop_strings) for _ in prompts]
    pieces: list[tuple[int, str]] = []

    def until(row: int, token: int) -> bool:
        pieces.append((row, texts[row].push(token)))
        return texts[row].ended

    options = {"stop": stop, "max_new_tokens": max_new_tokens, "seed": seed, "cuda_graph": cuda_graph}
    for _ in stream(model, prompts, sampling, until=until, **options):  # type: ignore[arg-type]
        yield from (piece for piece in pieces if piece[1])
        pieces.clear()
    yield from ((row, rest) for row, text in enumerate(texts) if (rest := text.finish()))


class _Sampler:
    """The choice of tokens for a batch of rows, with each row's random numbers and the tokens that it has seen."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, count: int, logits: Tensor
    ) -> None:
        self._sampling, self._count = sampling, 0
        self._uniforms: Tensor | None = None
        self._seen: Tensor | None = None
        if sampling.temperature > 0:
            copies: Counter[tuple[int, ...]] = Counter()
            rows = []
            for key in [tuple(prompt) for prompt in prompts]:
                rows.append(row_uniforms(seed, key, copies[key], count))
                copies[key] += 1
            self._uniforms = torch.from_numpy(np.stack(rows, axis=1)).to(logits.device)  # (count, B)
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(logits.shape, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self._seen[row, torch.tensor(list(prompt))] = True
            self._seen = self._seen.to(logits.device)

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose the next token of each row, (B,) int64."""
        if self._seen is not None:
            logits = penalise(logits, self._seen, self._sampling.repetition_penalty)
        chosen = choose(logits, self._sampling, None if self._uniforms is None else self._uniforms[self._count])
        self._count += 1
        if self._seen is not None:
            self._seen.scatter_(1, chosen.clamp(min=0).unsqueeze(-1), True)
        return chosen


def _runs_ahead(device: torch.device) -> bool:
    """Return whether a step is begun before the host knows whether it is needed.

    A GPU then has work while the host looks at the tokens. At an answer's end that step was in vain.
    """
    return device.type == "cuda"


def sent(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers as a tensor on the device, without waiting for it."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


class Copied:
    """Numbers on their way to the host: work that is launched after them goes on meanwhile."""

    def __init__(self, numbers: Tensor) -> None:
        self._host = numbers.to("cpu", non_blocking=True)
        self._there = None
        if numbers.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record()

    def numbers(self) -> list[Any]:
        """Wait for them, and return them as lists in lists."""
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()


def even_capacity(tokens: int) -> int:
    """Return the capacity of a cache for so many tokens."""
    return -(-tokens // EVEN) * EVEN


def padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the prompts (B, L), padded on the left, and document ids: 0 for padding, 1 for text (None: no padding)."""
    longest = max(map(len, prompts))
    input_ids = padded_ids(prompts, pad, longest).to(device)
    if all(len(prompt) == longest for prompt in prompts):
        return input_ids, None
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return input_ids, padding_documents(lengths, longest)


def padded_ids(prompts: Sequence[Sequence[int]], pad: int, length: int) -> Tensor:
    """Return the prompts (B, length), int64, padded on the left."""
    rows = [[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows, dtype=torch.int64)


def padding_documents(lengths: Tensor, length: int) -> Tensor:
    """Return document ids (B, length), int32: 1 for the last `lengths` (B,) tokens of each row, 0 before."""
    return (torch.arange(length, device=lengths.device) >= length - lengths.unsqueeze(1)).int()


def _check_prompts(model: Yaongi, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    def require(condition: bool, rule: str, got: object) -> None:
        if not condition:
            raise ValueError(f"generate: {rule}, got {got}")

    limit, vocab_size = model.config.max_sequence_length, model.config.vocab_size
    require(len(prompts) >= 1, "prompts must be at least one", "none")
    require(all(len(prompt) >= 1 for prompt in prompts), "every prompt must be at least one token", "an empty one")
    bad = next((token for prompt in prompts for token in prompt if not 0 <= token < vocab_size), None)
    require(bad is None, f"token ids must be 0 to {vocab_size - 1}", bad)
    rule = f"max_new_tokens must be 1 to {limit - 1}, below max_sequence_length"
    require(1 <= max_new_tokens < limit, rule, max_new_tokens)
    room, longest = limit - max_new_tokens, max(map(len, prompts))
    rule = f"prompts must be at most {room} tokens long ({limit} less the {max_new_tokens} to generate)"
    require(longest <= room, rule, longest)
