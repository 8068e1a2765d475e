"""Whether a tuned model does what it is told: the held-out conversations of the package, each answer right or wrong."""

from collections import defaultdict
from typing import Any, NamedTuple

from yaongi.data.chats.template import ANSWER, ANSWER_HEADER, render_chat
from yaongi.data.sources.embedded.instructions import BEHAVIOURS, instruction_rows, is_right
from yaongi.data.sources.source import VAL
from yaongi.eval.answering import Answerer, Prompt
from yaongi.eval.choices import proportion, standard_error

VERSION = 1  # of the questions: scores of different versions are not to be compared
GROUP = "instructions"
TASKS = {behaviour: f"{GROUP}_{behaviour.replace(' ', '_')}" for behaviour in BEHAVIOURS}
MAX_NEW_TOKENS = 128


class Question(NamedTuple):
    """A question, after those before it in its conversation and their right answers."""

    behaviour: str
    prompt: str
    answer: str


def questions(limit: int | None = None) -> list[Question]:
    """Return the questions, for each behaviour the first `limit` of them."""
    found: dict[str, list[Question]] = defaultdict(list)
    for row in instruction_rows(VAL):
        messages, behaviours = row["messages"], iter(row["behaviours"])
        for number, message in enumerate(messages):
            if message["role"] == ANSWER:
                behaviour = next(behaviours)
                prompt = render_chat(messages[:number]) + ANSWER_HEADER
                found[behaviour].append(Question(behaviour, prompt, message["content"]))
    return [question for behaviour in BEHAVIOURS for question in found[behaviour][:limit]]


def run_instructions(
    answerer: Answerer, limit: int | None = None, max_new_tokens: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return results and samples: the share of answers that are exactly right, by behaviour and over all questions.

    Greedy decoding. An answer that does not end by itself is not right.
    """
    asked = questions(limit)
    longest = min(MAX_NEW_TOKENS, max_new_tokens or MAX_NEW_TOKENS)
    answers = answerer.answer([Prompt(question.prompt, (), longest) for question in asked])
    pairs = list(zip(asked, answers, strict=True))
    common = {"shots": 0, "limit": limit, "version": str(VERSION), "chat": True}
    tasks: dict[str, Any] = {GROUP: _measured(pairs) | common | {"group": None, "tasks": list(TASKS.values())}}
    samples: dict[str, Any] = {}
    for behaviour, task in TASKS.items():
        mine = [pair for pair in pairs if pair[0].behaviour == behaviour]
        tasks[task] = _measured(mine) | common | {"group": GROUP}
        samples[task] = [
            {
                "id": number,
                "prompt": question.prompt,
                "target": question.answer,
                "answer": answer,
                "exact_match": float(is_right(question.answer, answer)),
            }
            for number, (question, answer) in enumerate(mine)
        ]
    return tasks, samples


def _measured(pairs: list[tuple[Question, str]]) -> dict[str, Any]:
    right = [float(is_right(question.answer, answer)) for question, answer in pairs]
    share = sum(right) / len(right)
    return {"n": len(right), "metrics": {"exact_match": proportion(share, standard_error(right), None, len(right))}}
