"""A running batch that rows join and leave: a fixed number of slots, whose caches are allocated once."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from yaongi.model.decoding import Cache, may_be_recorded, prefill, read, stepper
from yaongi.model.generation import even_capacity, padded, padded_ids, padding_documents, sent
from yaongi.model.layers.cuda_graph import GraphedFunction, GraphMemory
from yaongi.model.model import Yaongi

Tensor = torch.Tensor
SHORTEST_READ = 64  # tokens of the shortest prompts that are recorded, then twice as many; shorter ones are padded


class Slots:
    """Caches of `count` rows with room for `capacity` tokens each. A step reads a token of each of the first rows.

    Slots that hold no row are stepped along with the others; what they hold then means nothing, and no other row sees
    it. On a GPU a step is recorded as a CUDA graph for each number of rows (a power of two) and of places, and a
    reading of prompts for each number of rows and of tokens.
    """

    def __init__(
        self, model: Yaongi, count: int, capacity: int, *, cuda_graph: bool = True, recorded_tokens: int = 0
    ) -> None:
        """Allocate the caches.

        Args:
            cuda_graph: on a GPU, record and replay what can be.
            recorded_tokens: record readings of up to so many tokens, padding included.
        """
        self._model, self._cuda_graph = model, cuda_graph
        self._device = next(model.parameters()).device
        self._sizes = _doubled(1, count)
        nothing = torch.zeros(count, 1, dtype=torch.int64, device=self._device)
        self._cache = prefill(model, nothing, capacity=capacity)[1]
        self._steps: dict[int, tuple[Cache, Callable[[Tensor], Tensor]]] = {}
        self._reads: RecordedReads | None = None
        self.recorded_lengths: list[int] = []  # to which prompts are padded where that is recorded
        if cuda_graph and recorded_tokens and may_be_recorded(model, self._cache):
            self._reads = RecordedReads(model, self._cache, recorded_tokens)
            self.recorded_lengths = _doubled(SHORTEST_READ, min(recorded_tokens, capacity))

    def rows(self, needed: int) -> int:
        """Return how many rows a step has that needs the first so many."""
        return next(size for size in self._sizes if size >= needed)

    def shape(self, prompts: int, longest: int) -> tuple[int, int]:
        """Return the rows and the tokens of each with which so many prompts are read, padding included."""
        if self._reads is None:
            return prompts, longest
        return self.rows(prompts), next((n for n in self.recorded_lengths if n >= longest), longest)

    @torch.no_grad()
    def read(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts into slots, where they go on.

        Returns:
            The normalised hidden states (prompts, tokens of the longest, d), those of shorter ones at the end. They are
            valid until the next call.
        """
        lengths, pad = [len(prompt) for prompt in prompts], self._model.config.pad_token_id
        count, longest = len(prompts), max(lengths)
        rows, length = self.shape(count, longest)
        if self._reads is None or rows * length > self._reads.most:
            ids, document_ids = padded(prompts, pad, self._device)
            hidden, cache = read(self._model, ids, document_ids, capacity=even_capacity(longest))
            self.put(slots, cache, lengths)
            return hidden
        order = [row if row < count else 0 for row in range(rows)]  # the first one again: its slot gets the same twice
        ids = padded_ids([prompts[i] for i in order], pad, length).to(self._device, non_blocking=True)
        places, ends = (sent([numbers[i] for i in order], self._device) for numbers in (slots, lengths))
        return self._reads(ids, places, ends)[:count, -longest:]

    def put(self, slots: Sequence[int], cache: Cache, lengths: Sequence[int]) -> None:
        """Let the rows of another cache go on in slots: the last `lengths` tokens of each, all of its document."""
        self._cache.put(sent(slots, self._device), cache, sent(lengths, self._device))

    def step(self, tokens: Tensor, longest: int) -> Tensor:
        """Read a token of each of the first rows, (rows,) int64, and return the logits of the next ones, (rows, V).

        Args:
            longest: tokens read so far by the row that has most; below `capacity`.
        """
        rows = tokens.shape[0]
        if rows not in self._steps:
            cache = self._cache.first(rows)
            self._steps[rows] = cache, stepper(self._model, cache, cuda_graph=self._cuda_graph)
        cache, advance = self._steps[rows]
        cache.position = longest
        return advance(tokens)


def _doubled(first: int, last: int) -> list[int]:
    """Return the first number, doubled as long as it stays below the last one, and the last one."""
    numbers = []
    while first < last:
        numbers.append(first)
        first *= 2
    return [*numbers, last]


class RecordedReads:
    """Prompts read into rows of a cache on a GPU, recorded as a CUDA graph for each shape (rows, tokens of each).

    The first reading of a shape runs as usual, the second one is recorded. All graphs share the memory that they work
    in, which is what the largest needs, and their result; a shape adds its inputs and its graph.
    """

    def __init__(self, model: Yaongi, cache: Cache, most: int) -> None:
        """Prepare to record; `most`: tokens of the largest reading."""
        self.most = most
        self._model, self._cache = model, cache
        self._memory = GraphMemory()
        self._graphed: dict[tuple[int, int], Callable[[Tensor, Tensor, Tensor], None]] = {}
        self._hidden: list[Tensor] = []  # (most, d), once prompts have been read

    def __call__(self, input_ids: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
        """Read prompts (B, L), padded on the left, into rows `slots` (B,): the last `lengths` (B,) tokens of each.

        Returns:
            Their normalised hidden states (B, L, d), valid until the next call.
        """
        rows, length = shape = input_ids.shape[0], input_ids.shape[1]
        if shape not in self._graphed:
            run = partial(_read_into, self._model, self._cache, self.most, self._hidden)  # not self: that is a cycle
            self._graphed[shape] = GraphedFunction(
                run, "the reading of a prompt", "serve with --no-cuda-graph", self._memory
            )
        self._graphed[shape](input_ids, slots, lengths)
        return self._hidden[0][: rows * length].view(rows, length, -1)


def _read_into(
    model: Yaongi, cache: Cache, most: int, result: list[Tensor], input_ids: Tensor, slots: Tensor, lengths: Tensor
) -> None:
    """Read prompts into rows of the cache, and put their hidden states into the tensor that the list holds.

    The first call puts it there. This changes only tensors, in place: it may be recorded.
    """
    length = input_ids.shape[1]
    documents = padding_documents(lengths, length)
    hidden, read_cache = read(model, input_ids, documents, capacity=length, most_documents=2)
    cache.put(slots, read_cache, lengths)
    if not result:
        result.append(hidden.new_empty(most, hidden.shape[-1]))
    result[0][: hidden.shape[0] * length] = hidden.flatten(0, 1)
