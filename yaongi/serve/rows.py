"""What is asked for and what comes of it: a request of one answer, its row in the running batch, and its pieces."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from numpy.typing import NDArray

from yaongi.model.sampling import Sampling, row_uniforms
from yaongi.model.text_stream import TextStream

Finish = Literal["stop", "length"]
GREEDY = Sampling()


@dataclass(frozen=True)
class Request:
    """One answer that is asked for."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0
    copy: int = 0  # equal prompts before it in the same call, as in `generate`
    stop: tuple[str, ...] = ()  # strings that end the answer, which doesn't hold them
    alternatives: int | None = None  # likeliest tokens to score beside each token; None: nothing is scored
    echo: bool = False  # score the prompt's tokens too


class Scored(NamedTuple):
    """A token with its log-probability, from the model's distribution at temperature 1."""

    token: int
    logprob: float | None  # None for the first token of a prompt
    likeliest: tuple[tuple[int, float], ...] = ()  # the likeliest tokens in its place, with theirs


class Piece(NamedTuple):
    """What has come of a request since its last piece."""

    text: str = ""
    tokens: int = 0  # tokens chosen, with the one that ended the answer
    scored: tuple[Scored, ...] = ()
    finish: Finish | None = None  # with the last piece
    error: str | None = None  # instead of an end


def joined(pieces: Sequence[Piece]) -> Piece:
    """Return consecutive pieces of one answer as one."""
    text, scored = "".join(piece.text for piece in pieces), tuple(s for piece in pieces for s in piece.scored)
    return Piece(text, sum(piece.tokens for piece in pieces), scored, pieces[-1].finish, pieces[-1].error)


class Row:
    """A request on its way through the batch. What it gives goes to its listener, called on the server's thread."""

    def __init__(
        self,
        request: Request,
        decode: Callable[[Sequence[int]], str],
        listener: Callable[[Piece], None],
        *,
        whole: bool = False,
    ) -> None:
        """Prepare to answer; `whole`: in one piece, at the end."""
        self.request, self.listener = request, listener
        self.slot: int | None = None
        self.chosen = 0  # tokens chosen so far, which the host may not know yet
        self.ended = False
        self.cancelled = False
        self.prompt_scores: list[Scored] = []  # of its prompt's tokens, until its first piece takes them along
        self._seen = 0  # tokens that the host knows
        self._text = TextStream(decode, request.stop)
        self._pieces: list[Piece] | None = [] if whole else None  # kept until the end

    @property
    def position(self) -> int:
        """Tokens read: the prompt's and those chosen, but for the last one."""
        return len(self.request.prompt) + self.chosen - 1

    @property
    def goes_on(self) -> bool:
        """Whether another token may be chosen, as far as is known."""
        return not self.ended and self.chosen < self.request.max_tokens

    def uniform(self) -> float:
        """Return the random number of the next token."""
        return float(self._uniforms[self.chosen]) if self.request.sampling.temperature > 0 else 0.0

    def take(self, token: int, ends: Collection[int], scored: Scored | None) -> Piece | None:
        """Take the next token, −1 for one that could not be chosen, and return what has come of it.

        Of an answer that is wanted whole, nothing comes before its end.
        """
        piece = self._piece(token, ends, scored)
        if self._pieces is None:
            return piece
        self._pieces.append(piece)
        return joined(self._pieces) if self.ended else None

    def _piece(self, token: int, ends: Collection[int], scored: Scored | None) -> Piece:
        self._seen += 1
        scores = (*self.prompt_scores, *(() if scored is None else (scored,)))
        self.prompt_scores = []
        if token == -1:
            self.ended = True
            return Piece(error="the model's logits are not finite numbers")
        text = "" if token in ends else self._text.push(token)
        stopped = token in ends or self._text.ended
        if not stopped and self._seen < self.request.max_tokens:
            return Piece(text, 1, scores)
        self.ended = True
        return Piece(text + self._text.finish(), 1, scores, "stop" if stopped or self._text.ended else "length")

    @cached_property
    def _uniforms(self) -> NDArray:
        request = self.request
        return row_uniforms(request.seed, request.prompt, request.copy, request.max_tokens)
