"""Suites: which tasks, after how many examples, and what other models reached."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """A task or group of lm-eval, or one of our own."""

    task: str
    shots: int | None = None  # examples in the prompt; None: what the task says, or none


BASICS, INSTRUCTIONS = OWN = (Ask("basics", 0), Ask("instructions", 0))
SUITES: dict[str, tuple[Ask, ...]] = {
    "basics": (BASICS,),
    "instructions": (INSTRUCTIONS,),
    "quick": (BASICS, Ask("kmmlu_hard", 5), Ask("kobest_copa", 5), Ask("kobest_hellaswag", 5)),
    "korean": (BASICS, Ask("kmmlu", 5), Ask("haerae", 0), Ask("kobest", 5)),
    "math": (BASICS, Ask("hrm8k", 0), Ask("gsm8k", 5)),
    "code": (BASICS, Ask("humaneval", 0), Ask("mbpp", 3)),
}
PUBLISHED = {  # what the models' own cards and papers say
    "kmmlu": {"Qwen2.5-0.5B": 0.297, "Kanana-Nano-2.1B": 0.448, "KORMo-10B": 0.465},
}


def asks(suite: str, tasks: tuple[str, ...], shots: int | None) -> list[Ask]:
    """Return what to run: the named tasks, else the suite.

    Args:
        shots: instead of the suite's.

    Raises:
        ValueError: there is no such suite.
    """
    if suite not in SUITES:
        raise ValueError(f"eval: --suite must be among {', '.join(SUITES)}, got {suite!r}")
    own = {ask.task: ask for ask in OWN}
    named = [Ask(task, shots) for task in tasks] or [
        ask if shots is None else Ask(ask.task, shots) for ask in SUITES[suite]
    ]
    return [own.get(ask.task, ask) for ask in named]
