"""A running batch that rows join and leave: a fixed number of slots, whose caches are allocated once."""

from collections.abc import Callable, Sequence

import torch

from yaongi.model.decoding import Cache, prefill, stepper
from yaongi.model.model import Yaongi

Tensor = torch.Tensor


class Slots:
    """Caches of `count` rows with room for `capacity` tokens each. A step reads a token of each of the first rows.

    Slots that hold no row are stepped along with the others; what they hold then means nothing, and no other row sees
    it. On a GPU a step is recorded as a CUDA graph for each number of rows (a power of two) and of places.
    """

    def __init__(self, model: Yaongi, count: int, capacity: int, *, cuda_graph: bool = True) -> None:
        self._model, self._cuda_graph = model, cuda_graph
        self._sizes = [*(2**n for n in range(count.bit_length()) if 2**n < count), count]
        nothing = torch.zeros(count, 1, dtype=torch.int64, device=next(model.parameters()).device)
        self._cache = prefill(model, nothing, capacity=capacity)[1]
        self._steps: dict[int, tuple[Cache, Callable[[Tensor], Tensor]]] = {}

    def rows(self, needed: int) -> int:
        """Return how many rows a step has that needs the first so many."""
        return next(size for size in self._sizes if size >= needed)

    def put(self, slots: Sequence[int], cache: Cache, lengths: Sequence[int]) -> None:
        """Let the rows of another cache go on in slots: the last `lengths` tokens of each, all of its document."""
        rows, tokens = (torch.tensor(n).to(self._cache.place.device, non_blocking=True) for n in (slots, lengths))
        self._cache.put(rows, cache, tokens)

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
