"""The questions of the suite: `basics_items()` is the same list everywhere, always."""

import random
from collections.abc import Callable, Sequence

from yaongi.eval.basics.code import code_completion
from yaongi.eval.basics.language import kind_of_thing, particle, speech_level, tense
from yaongi.eval.basics.thinking import copy, sum_in_words, what_comes_next
from yaongi.eval.choices import Item

VERSION = 1  # of the questions: scores of different versions are not to be compared
GROUP = "basics"
QUESTIONS = 400  # of each task
TASKS: dict[str, tuple[str, Callable[[random.Random, int], tuple[str, Sequence[str], int]]]] = {
    "basics_particle": ("이, 가, 을 or 를 after a noun", particle),
    "basics_tense": ("past, future, progressive or proposal after a time", tense),
    "basics_speech_level": ("the ending of the sentences before", speech_level),
    "basics_kind": ("what a common word names", kind_of_thing),
    "basics_sum": ("sums and differences in words", sum_in_words),
    "basics_copy": ("a list of words again", copy),
    "basics_next": ("the next one of a known sequence", what_comes_next),
    "basics_code": ("a name, a module or brackets in Python", code_completion),
}


def basics_items(questions: int = QUESTIONS) -> list[Item]:
    """Return the first `questions` questions of each task, four choices each."""
    items = []
    for task, (_, make) in TASKS.items():
        for number in range(questions):
            context, choices, answer = make(random.Random(f"{task}/{VERSION}/{number}"), number)
            items.append(Item(task, context, tuple(choices), answer))
    return items
