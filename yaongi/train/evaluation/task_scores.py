"""Scores on tasks in the middle of a run: multiple choice, with the rows of training.

The questions are prepared by a thread while the first steps run; an evaluation then costs only the model's passes.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from yaongi import cli
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.basics.suite import GROUP, TASKS, basics_items
from yaongi.eval.choices import Item, encode_items, measure, score_items
from yaongi.eval.encoding import CachedEncoder
from yaongi.eval.harness.suites import BASICS, SUITES
from yaongi.eval.scoring import Request, Scorer
from yaongi.model import Yaongi
from yaongi.train.evaluation.held_out import evaluating
from yaongi.world import World

Prepared = tuple[list[Item], list[Request]]


class TaskScores:
    """The questions of a suite, and a model's scores on them."""

    def __init__(self, suite: str, tokenizer: Tokenizer, world: World, row_tokens: int) -> None:
        """Load the data sets, and begin to prepare the questions.

        Args:
            suite: `basics` or `quick`.
            row_tokens: of training; a longer prompt loses its beginning.

        Raises:
            ValueError: a data set is not there, or lm-eval is not installed.
        """
        self._world, self._row_tokens = world, row_tokens
        self._groups = {GROUP: list(TASKS)}
        loaded = []
        for ask in SUITES[suite]:
            if ask != BASICS:
                cli.require("lm_eval")
                from yaongi.eval.harness.task_data import load_tasks, task_manager

                tasks = load_tasks(task_manager([ask.task]), ask.task)
                loaded.append((tasks, ask.shots))
                if list(tasks) != [ask.task]:
                    self._groups[ask.task] = list(tasks)
        pool = ThreadPoolExecutor(1, "yaongi-tasks")
        self._prepared: Future[Prepared] = pool.submit(_prepare, loaded, tokenizer)
        pool.shutdown(wait=False)

    def measure(self, model: Yaongi, rows_per_pass: int, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
        """Return what `choices.measure` says of each task and group; every process has to call it."""
        items, requests = self._prepared.result()
        scorer = Scorer(model, self._world, self._row_tokens, rows_per_pass, say=say, longest=self._row_tokens)
        with evaluating(model):
            outcomes = score_items(scorer, items, requests)
        names = [item.task for item in items]
        members = {name: [name] for name in dict.fromkeys(names)} | self._groups
        by_task = {
            name: [outcome for outcome, task in zip(outcomes, names, strict=True) if task in tasks]
            for name, tasks in members.items()
        }
        return {name: measure(found) for name, found in by_task.items()}

    def top(self, scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the scores without those of the tasks in groups."""
        inner = {task for tasks in self._groups.values() for task in tasks}
        return {name: found for name, found in scores.items() if name not in inner}


def _prepare(loaded: list[tuple[dict[str, Any], int | None]], tokenizer: Tokenizer) -> Prepared:
    items = basics_items()
    if loaded:
        from yaongi.eval.harness.task_items import task_items

        for tasks, shots in loaded:
            items += task_items(tasks, shots)
    return items, encode_items(items, CachedEncoder(tokenizer))


def said(scores: dict[str, dict[str, Any]]) -> str:
    """Return the scores as part of a line: per cent right, and nats between the right answer and the others."""
    parts = []
    for name, found in scores.items():
        acc = found["metrics"]["acc"]
        chance = " (chance)" if abs(acc["distance"]) < 2 else ""
        parts.append(f"{name} {100 * acc['value']:.1f}%{chance} margin {found['margin']:+.2f}")
    return ", ".join(parts)
