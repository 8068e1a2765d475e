"""Questions with a fixed set of answers, and what a model's log-likelihoods say about them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from yaongi.eval.scoring import Request, Scorer


@dataclass(frozen=True)
class Item:
    """A question."""

    task: str
    context: str
    choices: tuple[str, ...]  # each follows the context as it is, its first blank included
    answer: int  # index of the right one


@dataclass(frozen=True)
class Outcome:
    """A model's answer to a question: the choice with the largest log-likelihood, the first of equal ones."""

    log_likelihoods: tuple[float, ...]  # nats
    text_bytes: tuple[int, ...]  # UTF-8 bytes of each choice
    answer: int

    @property
    def right(self) -> bool:
        """Whether the largest log-likelihood is that of the right answer."""
        return int(np.argmax(self.log_likelihoods)) == self.answer

    @property
    def margin(self) -> float:
        """Nats between the right answer and the mean of the others."""
        others = [value for i, value in enumerate(self.log_likelihoods) if i != self.answer]
        return self.log_likelihoods[self.answer] - sum(others) / len(others)


def encode_items(items: Sequence[Item], encode: Callable[[str], list[int]]) -> list[Request]:
    """Return the requests of all choices, cut as lm-eval cuts them.

    Context and choice are encoded together, and the choice is what follows as many tokens as the context has alone,
    without the blanks at its end.
    """
    requests = []
    for item in items:
        start = len(encode(item.context.rstrip()))
        for choice in item.choices:
            whole = encode(item.context + choice)
            requests.append(Request(whole[:start], whole[start:]))
    return requests


def score_items(scorer: Scorer, items: Sequence[Item], requests: Sequence[Request]) -> list[Outcome]:
    """Return the outcome of each item, whose requests are those of `encode_items`."""
    scores = iter(scorer.score(requests))
    return [
        Outcome(
            tuple(next(scores).log_likelihood for _ in item.choices),
            tuple(len(choice.encode()) for choice in item.choices),
            item.answer,
        )
        for item in items
    ]


def measure(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what a task's outcomes come to, as JSON can hold it.

    Returns:
        `n`; `acc` as `proportion` gives it; `bits_per_byte` of the right answer; `margin`, the mean in nats. The last
        two move long before the accuracy does.
    """
    right = np.array([outcome.right for outcome in outcomes], float)
    chance = float(np.mean([1 / len(outcome.log_likelihoods) for outcome in outcomes]))
    nats = -sum(outcome.log_likelihoods[outcome.answer] for outcome in outcomes)
    text_bytes = sum(outcome.text_bytes[outcome.answer] for outcome in outcomes)
    return {
        "n": len(outcomes),
        "metrics": {"acc": proportion(float(right.mean()), standard_error(right), chance, len(right))},
        "bits_per_byte": nats / math.log(2) / text_bytes,
        "margin": float(np.mean([outcome.margin for outcome in outcomes])),
    }


def standard_error(values: Sequence[float] | np.ndarray) -> float | None:
    """Return the standard error of the values' mean; None for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def proportion(value: float, error: float | None, chance: float | None, count: int) -> dict[str, float | None]:
    """Return a score as JSON can hold it.

    Args:
        value: 0 to 1.
        chance: the score that guessing would have; None where there is nothing to guess from.
        count: questions.

    Returns:
        `value`, `stderr`, `chance`, and `distance`: from chance, in standard errors of guessing.
    """
    distance = None if chance is None else (value - chance) / math.sqrt(chance * (1 - chance) / count)
    return {"value": value, "stderr": error, "chance": chance, "distance": distance}
