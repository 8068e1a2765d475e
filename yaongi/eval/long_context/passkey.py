"""A number hidden in a long Korean text, and asked for at its end.

The text is of sentences that the package makes up, the same for the same seed. The model has retrieved the number if
each of its tokens is the likeliest one after the question.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from yaongi.data.sources.embedded.korean import korean_documents
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.scoring import Request, Scorer

NEEDLE = "열쇠 번호는 {number}입니다. 열쇠 번호 {number}를 꼭 기억하세요."
QUESTION = "\n앞에서 말한 열쇠 번호는"


@dataclass(frozen=True)
class Trial:
    """A text of so many tokens, in which a number stands at a depth of 0 (its beginning) to 1 (its end)."""

    length: int
    depth: float
    request: Request


def trials(
    tokenizer: Tokenizer, lengths: Sequence[int], depths: Sequence[float], tries: int, seed: int = 0
) -> Iterator[Trial]:
    """Yield `tries` texts for each length and depth.

    Raises:
        ValueError: a length has no room for number and question.
    """
    for length in lengths:
        for depth in depths:
            for number in range(tries):
                rng = random.Random(f"passkey/{seed}/{length}/{depth}/{number}")
                yield Trial(length, depth, _request(tokenizer, length, depth, rng))


def _request(tokenizer: Tokenizer, length: int, depth: float, rng: random.Random) -> Request:
    secret = str(rng.randint(10000, 99999))
    needle = tokenizer.encode(f" {NEEDLE.format(number=secret)} ")
    question, answer = tokenizer.encode(QUESTION), tokenizer.encode(f" {secret}")
    room = length - len(needle) - len(question) - len(answer)
    if room < 1:
        least = length - room + 1
        raise ValueError(f"passkey: --lengths must be {least} or more, to hold number and question, got {length}")
    text: list[int] = []
    filler = korean_documents(rng.getrandbits(31), length)  # more than enough documents
    while len(text) < room:
        text += tokenizer.encode(next(filler))
    cut = round(depth * room)
    return Request([*text[:cut], *needle, *text[cut:room], *question], answer)


def retrieved(scorer: Scorer, found: Sequence[Trial]) -> dict[tuple[int, float], float]:
    """Return the share of retrieved numbers by length and depth."""
    scores = scorer.score([trial.request for trial in found])
    cells: dict[tuple[int, float], list[bool]] = {}
    for trial, score in zip(found, scores, strict=True):
        cells.setdefault((trial.length, trial.depth), []).append(score.greedy)
    return {cell: sum(hits) / len(hits) for cell, hits in cells.items()}
