"""The running batch: requests wait, are read, join at the boundary of two steps, and leave when they end."""

import heapq
import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from yaongi.model import Yaongi
from yaongi.model.decoding import Cache, read, read_on
from yaongi.model.generation import Copied, even_capacity, sent
from yaongi.model.sampling import RowSampling, Sampling, choose
from yaongi.model.slots import Slots
from yaongi.serve.rows import GREEDY, Piece, Request, Row, Scored

Tensor = torch.Tensor
Said = list[tuple[Row, Piece]]


@dataclass(frozen=True)
class Limits:
    """How much is done at once."""

    slots: int  # answers
    capacity: int  # tokens of prompt and answer together
    chunk: int = 512  # tokens of prompts that are read between two steps
    queue: int = 256  # requests that may wait for a slot


class QueueFullError(Exception):
    """More requests than may wait."""


class Engine:
    """Everything that is answered at once. `work` does the work between two boundaries, on the engine's thread alone.

    On a GPU that runs ahead, a step is begun before the host knows the tokens of the one before: what it did for a row
    that ended is left out.
    """

    def __init__(
        self,
        model: Yaongi,
        ends: Collection[int],
        limits: Limits,
        *,
        cuda_graph: bool = True,
        runs_ahead: bool = False,
    ) -> None:
        """Allocate the caches.

        Args:
            ends: tokens that end an answer.
            cuda_graph: on a GPU, record the steps and the reading of prompts, and replay them.
            runs_ahead: begin a step before the tokens of the last one are known.
        """
        self._model, self._ends, self._limits = model, set(ends), limits
        self._ahead = runs_ahead
        self._device = next(model.parameters()).device
        self._slots = Slots(
            model, limits.slots, even_capacity(limits.capacity), cuda_graph=cuda_graph, recorded_tokens=limits.chunk
        )
        self._last = torch.zeros(limits.slots, dtype=torch.int64, device=self._device)  # the newest token of each slot
        self._free = list(range(limits.slots))  # a heap: the first slots are used first
        self._running: dict[int, Row] = {}
        self._reading: _Reading | None = None
        self._flying: deque[_Flight] = deque()  # tokens on their way to the host
        self._said: Said = []
        self._settings: tuple[list[Sampling], RowSampling | Sampling] = ([], GREEDY)
        self._wake = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._closed = False

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows, all or none of them.

        Raises:
            QueueFullError: more would wait than may, or the engine has stopped.
        """
        with self._wake:
            room = self._limits.queue + len(self._free) - len(self._waiting)
            if self._closed or len(rows) > room:
                raise QueueFullError
            self._waiting.extend(rows)
            self._wake.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Have rows leave at the next boundary; those that have ended stay as they are."""
        with self._wake:
            for row in rows:
                row.cancelled = True
            self._wake.notify()

    def load(self) -> tuple[int, int]:
        """Return how many rows are answered, and how many wait."""
        return self._limits.slots - len(self._free), len(self._waiting)

    def run(self, deliver: Callable[[Said], None]) -> None:
        """Work until `stop`; the thread's loop. Rows that are left are told so, after an error too.

        Args:
            deliver: takes the pieces of the rows, in order.
        """
        reason = "the server has stopped"
        try:
            while self._wait():
                if said := self.work():
                    deliver(said)
        except Exception as error:
            reason = f"the engine has failed: {' '.join(str(error).split())}"
            raise
        finally:
            with self._wake:
                self._closed = True
                left = [*self._running.values(), *(self._reading.rows if self._reading else ()), *self._waiting]
            deliver([(row, Piece(error=reason)) for row in left if not row.ended])

    def stop(self) -> None:
        """Have `run` return after the present step."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    @torch.no_grad()
    def work(self) -> Said:
        """Read some of the prompts that wait, do a step, and return what has come."""
        self._drop_cancelled()
        self._read_prompts()
        if not self._ahead:
            self._receive(0)
        stepped = self._step()
        self._receive(1 if stepped and self._ahead else 0)
        said, self._said = self._said, []
        return said

    def warm_up(self) -> list[int]:
        """Answer requests whose reading and steps are recorded, so that no user waits for that.

        Returns:
            The lengths of their prompts: one for each length of recorded prompts that are read alone.
        """
        lengths = [min(length, self._limits.capacity - 1) for length in self._slots.recorded_lengths]
        for length in reversed(lengths):  # see `GraphMemory`
            for sampling in (GREEDY, Sampling(1.0)):  # the second call is recorded, and both ways to choose are ready
                self.submit([Row(Request((0,) * length, 2, sampling), lambda ids: "", lambda piece: None)])
                while self.busy:
                    self.work()
        return lengths

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self._waiting or self._reading or self._running or self._flying)

    def _wait(self) -> bool:
        """Wait for something to do; return False to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self.busy)
            return not self._closed

    def _drop_cancelled(self) -> None:
        with self._wake:
            if any(row.cancelled for row in self._waiting):
                self._waiting = deque(row for row in self._waiting if not row.cancelled)
        for row in [row for row in self._running.values() if row.cancelled]:
            self._leave(row)
        if self._reading and all(row.cancelled for row in self._reading.rows):
            for row in self._reading.rows:
                self._leave(row)
            self._reading = None

    def _leave(self, row: Row) -> None:
        row.ended = True
        if row.slot is not None:
            self._running.pop(row.slot, None)
            heapq.heappush(self._free, row.slot)
            row.slot = None

    def _read_prompts(self) -> None:
        """Read a piece of a long prompt, or some short ones, and let them join when they are read."""
        if self._reading is None:
            rows = self._admitted()
            if not rows:
                return
            self._reading = _Reading(rows)
        reading = self._reading
        hidden = reading.read(self._model, self._slots, self._limits.chunk)
        if reading.whole:
            self._reading = None
            self._join(reading.rows, hidden[:, -1])

    def _admitted(self) -> list[Row]:
        """Take the next rows that wait: one, or several whose padded prompts are a piece together. They get slots."""
        rows: list[Row] = []
        longest = 0
        with self._wake:
            while self._waiting and self._free:
                longest = max(longest, len(self._waiting[0].request.prompt))
                if rows and math.prod(self._slots.shape(len(rows) + 1, longest)) > self._limits.chunk:
                    break
                row = self._waiting.popleft()
                row.slot = heapq.heappop(self._free)
                rows.append(row)
        return rows

    def _join(self, rows: list[Row], last: Tensor) -> None:
        """Choose the first tokens, from the hidden states (B, d) of the last ones, and let the rows go on."""
        slots = _slots_of(rows)
        chosen = self._choose(self._model.lm_head(last.unsqueeze(1))[:, 0], rows)
        places = sent(slots, self._device)
        self._last.index_copy_(0, places, chosen.clamp(min=0))
        self._running.update(zip(slots, rows, strict=True))

    def _step(self) -> bool:
        """Choose a token for each row that goes on; return whether there was one."""
        rows = {slot: row for slot, row in self._running.items() if row.goes_on}
        if not rows:
            return False
        size = self._slots.rows(1 + max(rows))
        logits = self._slots.step(self._last[:size], max(row.position for row in rows.values()))
        self._last[:size] = self._choose(logits, [rows.get(slot) for slot in range(size)]).clamp(min=0)
        return True

    def _choose(self, logits: Tensor, rows: Sequence[Row | None]) -> Tensor:
        """Return the tokens chosen from logits (B, V), and send them to the host."""
        samplings = [GREEDY if row is None else row.request.sampling for row in rows]
        if samplings != self._settings[0]:
            self._settings = samplings, RowSampling.of(samplings, logits.shape[1], self._device)
        uniforms = None
        if any(sampling.temperature > 0 for sampling in samplings):
            numbers = [0.0 if row is None else row.uniform() for row in rows]
            uniforms = sent(numbers, self._device, torch.float64)
        chosen = choose(logits, self._settings[1], uniforms)
        wanted = [(number, row) for number, row in enumerate(rows) if row and row.request.alternatives is not None]
        scores = None
        if wanted:
            places = sent([number for number, _ in wanted], self._device)
            most = max(row.request.alternatives or 0 for _, row in wanted)
            scores = _scores(logits[places], chosen[places].clamp(min=0), most)
        self._flying.append(_Flight(rows, Copied(chosen), [number for number, _ in wanted], scores))
        for row in rows:
            if row is not None:
                row.chosen += 1
        return chosen

    def _receive(self, left: int) -> None:
        """Take the tokens that were chosen, except those of the last so many times."""
        while len(self._flying) > left:
            flight = self._flying.popleft()
            tokens, scores = flight.tokens.numbers(), {}
            if flight.scores is not None:
                scores = dict(zip(flight.scored, flight.scores.numbers(), strict=True))
            for number, row in enumerate(flight.rows):
                if row is None or row.ended:
                    continue
                scored = None
                if number in scores:
                    scored = _as_scored(tokens[number], scores[number], row.request.alternatives or 0)
                piece = row.take(tokens[number], self._ends, scored)
                if piece is not None:
                    self._said.append((row, piece))
                if row.ended:
                    self._leave(row)


@dataclass
class _Flight:
    """What a step has chosen, on its way to the host."""

    rows: Sequence[Row | None]
    tokens: Copied  # (B,)
    scored: list[int]  # rows whose tokens are scored
    scores: Copied | None  # of these rows, as `_scores` gives them


class _Reading:
    """Prompts that are being read into their slots: short ones together at once, or a long one piece by piece."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self._longest, self._done = max(len(row.request.prompt) for row in rows), 0
        self._cache: Cache | None = None

    @property
    def whole(self) -> bool:
        """Whether the prompts are read to their ends."""
        return self._done == self._longest

    def read(self, model: Yaongi, slots: Slots, chunk: int) -> Tensor:
        """Read up to `chunk` more tokens of each row, and return their hidden states (B, L, d)."""
        if self._longest <= chunk:
            hidden = slots.read(_slots_of(self.rows), [row.request.prompt for row in self.rows])
        else:
            hidden = self._read_piece(model, slots, chunk)
        for number, row in enumerate(self.rows):
            if row.request.echo and row.request.alternatives is not None:
                self._score(model, hidden[number], row)
        self._done += hidden.shape[1]
        return hidden

    def _read_piece(self, model: Yaongi, slots: Slots, chunk: int) -> Tensor:
        """Read the next tokens of a long prompt, which is alone, and put it into its slot at its end."""
        (row,) = self.rows
        piece, device = row.request.prompt[self._done : self._done + chunk], next(model.parameters()).device
        ids = sent([piece], device)
        if self._cache is None:
            hidden, self._cache = read(model, ids, capacity=even_capacity(self._longest))
        else:
            hidden = read_on(model, ids, self._cache)
        if self._done + len(piece) == self._longest:
            slots.put(_slots_of(self.rows), self._cache, [self._longest])
        return hidden

    def _score(self, model: Yaongi, hidden: Tensor, row: Row) -> None:
        """Score the prompt's tokens that come after these hidden states (L, d)."""
        prompt, begin = row.request.prompt, self._longest - len(row.request.prompt)  # of the prompt, after its padding
        first = max(self._done, begin)
        last = min(self._done + hidden.shape[0], self._longest - 1)
        if not row.prompt_scores:
            row.prompt_scores.append(Scored(prompt[0], None))
        if last > first:
            following = prompt[first + 1 - begin : last + 1 - begin]
            logits = model.lm_head(hidden[first - self._done : last - self._done].unsqueeze(0))[0]
            tokens = sent(following, logits.device)
            most = row.request.alternatives or 0
            for token, scores in zip(following, _scores(logits, tokens, most).numbers(), strict=True):
                row.prompt_scores.append(_as_scored(token, scores, most))


def _slots_of(rows: Sequence[Row]) -> list[int]:
    """Return the slots of rows that have some."""
    return [row.slot for row in rows if row.slot is not None]


def _scores(logits: Tensor, tokens: Tensor, most: int) -> Copied:
    """Return for each row its token's log-probability, those of the `most` likeliest tokens, and these tokens."""
    logprobs = logits.float().log_softmax(-1)
    values, likeliest = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
    own = logprobs.gather(-1, tokens.unsqueeze(-1))
    return Copied(torch.cat([own.double(), values.double(), likeliest.double()], dim=-1))


def _as_scored(token: int, scores: Sequence[float], most: int) -> Scored:
    """Return a token's scores from a row of `_scores`, with no more than `most` alternatives."""
    count = len(scores) // 2
    values, likeliest = scores[1 : 1 + count], scores[1 + count :]
    return Scored(token, scores[0], tuple((int(i), v) for i, v in zip(likeliest[:most], values[:most], strict=True)))
