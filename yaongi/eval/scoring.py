"""Log-likelihoods of continuations, the measure behind multiple choice, perplexity and preferences.

Each request becomes a pass: the tokens that the model reads, all but the last. Passes are packed into rows of one
length, each a document of its own, as in training. A pass that another one begins with shares that one's: the four
letters of a question are one pass. The head is computed only where a token is scored, its softmax in float32.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from yaongi.data.packing import pack
from yaongi.eval.progress import Done
from yaongi.eval.rows.batches import Batch, Pass, make_batches, run_batch
from yaongi.model import Yaongi
from yaongi.world import World

ROW_TOKENS = 4096  # of the longest rows, where no request is longer
CPU_ROWS = 4  # rows per pass on a CPU
MOST_ROWS = 64
EVEN = 128  # rows are multiples of it: the scan's chunk
SAMPLE, NEARLY = 4096, 0.005  # passes that a row's length is chosen by; a longer row may waste so much more
ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Request:
    """A continuation to score after a context, both token ids. Without a context nothing predicts the first token."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Score:
    """What a model says of a continuation."""

    log_likelihood: float  # nats, the sum over the continuation's tokens
    greedy: bool  # whether each token is the likeliest one


@dataclass
class Tally:
    """What scoring has cost so far, over all processes."""

    requests: int = 0
    cut: int = 0  # requests that lost the beginning of their context, which was too long
    cut_tokens: int = 0  # tokens that they lost
    tokens: int = 0  # read by the model
    positions: int = 0  # the same with the rows' padding
    row_tokens: int = 0  # of the last rows
    seconds: float = 0.0

    @property
    def fill(self) -> float:
        """The share of the positions that are tokens; 1 where there are none."""
        return self.tokens / self.positions if self.positions else 1.0


@dataclass
class Scorer:
    """The scorer of a model. `score` gives the same numbers for any number of processes."""

    model: Yaongi
    world: World = ALONE
    row_tokens: int = 0  # tokens per row; 0: up to 4,096, or the longest request's, so that rows are full
    rows_per_pass: int = 0  # 0: as many as fit into a GPU's memory, CPU_ROWS on a CPU
    done: Done = field(default_factory=Done)  # what was scored before the program was interrupted
    say: Callable[[str], None] = print
    tally: Tally = field(default_factory=Tally)
    rows_at_once: int = 0  # rows that were run together last; fewer than planned where they didn't fit into memory
    longest: int = 0  # the longest sequence to read; 0: the model's max_sequence_length
    _fitting_tokens: int = field(default=0, init=False, repr=False)  # on a GPU, together

    @property
    def max_length(self) -> int:
        """The longest sequence that the model reads."""
        return self.longest or self.model.config.max_sequence_length

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Score each request.

        A context and continuation of more than `max_length` + 1 tokens lose their first ones. The first token of a
        request without a context costs ln V and is not greedy.

        Raises:
            ValueError: a continuation is empty or longer than `max_length`, or a score is not a number.
            torch.OutOfMemoryError: not even one row fits into memory.
        """
        began = time.perf_counter()
        totals = np.zeros(len(requests))
        hits = np.zeros(len(requests), np.int64)
        passes = self._passes(requests)
        lengths = [len(p.tokens) for p in passes]
        row_tokens = self.choose_row_tokens(lengths)
        rows = pack(lengths, row_tokens)
        rows_per_pass = self._rows_per_pass(row_tokens)
        self.rows_at_once, self.tally.row_tokens = rows_per_pass, row_tokens
        batches = make_batches(passes, rows, row_tokens, rows_per_pass)
        todo = [batch for batch in batches if batch.digest not in self.done]
        if self.world.rank == 0:
            for batch in batches:
                if batch.digest in self.done:
                    totals[batch.requests], hits[batch.requests] = self.done[batch.digest]
        for batch, sums, greedy in self._run(todo[self.world.rank :: self.world.size], len(todo)):
            totals[batch.requests], hits[batch.requests] = sums, greedy
            self.done.add(batch.digest, [sums.tolist(), greedy.tolist()])
        totals = self.world.sum_on_host(torch.from_numpy(totals)).numpy()
        hits = self.world.sum_on_host(torch.from_numpy(hits)).numpy()
        self._count(requests, passes, len(rows) * row_tokens, time.perf_counter() - began)
        return self._scores(requests, totals, hits)

    def _scores(self, requests: Sequence[Request], totals: NDArray[np.float64], hits: NDArray[np.int64]) -> list[Score]:
        free = math.log(self.model.config.vocab_size)
        scores = []
        for request, total, hit in zip(requests, totals.tolist(), hits.tolist(), strict=True):
            if not math.isfinite(total):
                raise ValueError(f"scoring: log-likelihoods must be finite numbers, got {total}")
            scores.append(Score(total, bool(hit)) if request.context else Score(total - free, False))
        return scores

    def _passes(self, requests: Sequence[Request]) -> list[Pass]:
        """Return the passes of the requests; one that another one begins with is that one."""
        limit = self.max_length
        by_tokens: dict[bytes, list[tuple[int, int, NDArray[np.int32]]]] = {}
        for number, request in enumerate(requests):
            length = len(request.continuation)
            if not 1 <= length <= limit:
                raise ValueError(f"scoring: a continuation must be 1 to {limit} tokens long (max_length), got {length}")
            whole = np.fromiter((*request.context, *request.continuation), np.int32)[-(limit + 1) :]
            first = max(1, len(whole) - length)
            if len(whole) > 1:
                by_tokens.setdefault(whole[:-1].tobytes(), []).append((number, first, whole[first:]))
        passes: list[Pass] = []
        following = b""
        for key in sorted(by_tokens, reverse=True):
            if not (passes and following.startswith(key)):
                passes.append(Pass(np.frombuffer(key, np.int32)))
                following = key
            for number, first, targets in by_tokens[key]:
                passes[-1].add(number, first - 1, targets)
        return passes

    def choose_row_tokens(self, lengths: Sequence[int]) -> int:
        """Return the length of rows for passes of these lengths: the longest of those that are nearly as full as any.

        Rows have room for two of the longest passes, so they may be longer than a sequence may be.
        """
        longest = max(lengths, default=1)
        if self.row_tokens:
            return max(self.row_tokens, longest)
        some = lengths[:: 1 + len(lengths) // SAMPLE]
        first = -(-longest // EVEN) * EVEN
        last = max(min(ROW_TOKENS, self.max_length), 2 * first)
        sizes = range(first, last + 1, EVEN)
        fills = {row: sum(some) / (row * max(1, len(pack(some, row)))) for row in sizes}
        return max(row for row, fill in fills.items() if fill >= max(fills.values()) - NEARLY)

    def _rows_per_pass(self, row_tokens: int) -> int:
        """Return how many rows are run at once: on a GPU found by running one and measuring its peak."""
        if self.rows_per_pass:
            return self.rows_per_pass
        if self.world.device.type != "cuda":
            return CPU_ROWS
        if not self._fitting_tokens:
            self._fitting_tokens = self._measure(row_tokens)
        rows = max(1, min(MOST_ROWS, self._fitting_tokens // row_tokens))
        return 1 << (rows.bit_length() - 1)

    def _measure(self, row_tokens: int) -> int:
        """Return the tokens that fit into the memory of every process's GPU at once."""
        device = self.world.device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        one = make_batches([Pass(np.zeros(row_tokens, np.int32))], [[0]], row_tokens, 1)[0]
        run_batch(self.model, one, 0, 1, device)
        per_token = max(1, torch.cuda.max_memory_allocated(device) - before) / row_tokens
        torch.cuda.empty_cache()
        fits = int(0.85 * torch.cuda.mem_get_info(device)[0] / per_token)
        return min(self.world.gather(fits))

    def _run(self, batches: Iterable[Batch], of: int) -> Iterator[tuple[Batch, NDArray[np.float64], NDArray[np.int64]]]:
        """Yield each batch with its results, read one batch late: the GPU has work while the host looks at them."""
        waiting = None
        for batch in batches:
            parts = self._launch(batch)
            if waiting is not None:
                yield waiting[0], *waiting[0].sums(waiting[1])
            waiting = batch, parts
        if waiting is not None:
            yield waiting[0], *waiting[0].sums(waiting[1])

    def _launch(self, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Run a batch, in parts if its rows don't fit into memory."""
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        start, count = 0, min(self.rows_at_once or len(batch.input_ids), len(batch.input_ids))
        while start < len(batch.input_ids):
            try:
                parts.append(run_batch(self.model, batch, start, start + count, self.world.device))
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                count = self.rows_at_once = count // 2
                self._fitting_tokens //= 2
                self.rows_per_pass = count if self.rows_per_pass else 0
                self.say(f"out of memory: {count} rows per pass from here on")
                if self.world.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            start += count
        return parts

    def _count(self, requests: Sequence[Request], passes: Sequence[Pass], positions: int, seconds: float) -> None:
        most = self.max_length + 1
        lost = [len(r.context) + len(r.continuation) - most for r in requests]
        tally = self.tally
        tally.requests += len(requests)
        tally.cut += sum(tokens > 0 for tokens in lost)
        tally.cut_tokens += sum(max(0, tokens) for tokens in lost)
        tally.tokens += sum(len(p.tokens) for p in passes)
        tally.positions += positions
        tally.seconds += seconds
