"""Runs of lm-eval's tasks, with results in the form of `report/results.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from yaongi.data.pieces import END_OF_TURN
from yaongi.eval.choices import Outcome, measure, proportion
from yaongi.eval.harness.suites import Ask
from yaongi.eval.harness.task_data import load_tasks, revision
from yaongi.eval.lm_eval_adapter import YaongiLM

SEED = 1234  # of the examples in the prompts, lm-eval's own default
BOOTSTRAP = 1000  # draws for standard errors that have no formula


@dataclass(frozen=True)
class Found:
    """Results of some tasks: what `results.json` holds of each, and the samples behind them."""

    tasks: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]


def run_tasks(
    lm: YaongiLM,
    asked: Sequence[Ask],
    manager: TaskManager,
    *,
    limit: int | None = None,
    chat: bool = False,
    allow_code: bool = False,
) -> Found:
    """Run the tasks, those of as many shots together.

    Raises:
        ValueError: a data set is missing, or has too few examples for the shots.
    """
    loaded = {ask.task: load_tasks(manager, ask.task) for ask in asked}
    if chat:
        lm.answerer.stop_pieces = (END_OF_TURN,)
    tasks: dict[str, dict[str, Any]] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    for shots in dict.fromkeys(ask.shots for ask in asked):
        names = [ask.task for ask in asked if ask.shots == shots]
        try:
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=list(names),
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=BOOTSTRAP,
                apply_chat_template=chat,
                fewshot_random_seed=SEED,
                confirm_run_unsafe_code=allow_code,
            )
        except ValueError as error:
            if "larger than population" in str(error):
                raise ValueError(f"eval: --shots must be at most the task's examples, got {shots}") from error
            raise
        if results is None:
            continue  # a process that reports nothing
        for name in names:
            _collect(results, name, loaded[name], lm, tasks)
        samples |= {task: [_sample(s) for s in found] for task, found in results["samples"].items()}
    for entry in tasks.values():
        entry["limit"], entry["chat"] = limit, chat
    return Found(tasks, samples)


def _collect(
    results: dict[str, Any], name: str, loaded: dict[str, Any], lm: YaongiLM, tasks: dict[str, dict[str, Any]]
) -> None:
    """Add the results of a task, or of a group and its tasks."""
    for task, made in loaded.items():
        entry = {
            **_measured(results["results"][task], results["samples"][task], made),
            "shots": results["n-shot"][task],
            "version": str(results["versions"].get(task)),
            "data": made.config.dataset_path,
            "revision": revision(made),
            "cut": lm.cut[task],
            "answers_shortened": lm.shortened[task],
            "group": name if task != name else None,
        }
        tasks[task] = entry
    if list(loaded) != [name]:
        for group, members in results["group_subtasks"].items():
            leaves = _leaves(group, results["group_subtasks"])
            if members and all(leaf in tasks for leaf in leaves):
                tasks[group] = _aggregate([tasks[leaf] for leaf in leaves], leaves, name if group != name else None)


def _leaves(name: str, members: dict[str, list[str]]) -> list[str]:
    if not members.get(name):
        return [name]
    return [leaf for member in members[name] for leaf in _leaves(member, members)]


def _measured(values: dict[str, Any], samples: list[dict[str, Any]], task: Any) -> dict[str, Any]:
    outcomes = [o for o in map(_outcome, samples) if o is not None] if task.OUTPUT_TYPE == "multiple_choice" else []
    found: dict[str, Any] = {"n": len({s["doc_id"] for s in samples}), "metrics": {}}
    if outcomes:
        found = measure(outcomes)
    chance = found["metrics"]["acc"]["chance"] if outcomes else None
    metrics = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = values.get(f"{metric}_stderr,{kind}")
            error = float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None
            label = metric if kind == "none" else f"{metric} ({kind})"
            guessed = chance if metric.startswith("acc") else None
            metrics[label] = proportion(float(value), error, guessed, found["n"])
    return found | {"metrics": metrics}


def _aggregate(entries: list[dict[str, Any]], names: list[str], group: str | None) -> dict[str, Any]:
    """Return the results of a group: each metric over all questions (micro) and over all tasks (macro)."""
    count = sum(entry["n"] for entry in entries)
    shared = [metric for metric in entries[0]["metrics"] if all(metric in entry["metrics"] for entry in entries)]
    metrics = {}
    for metric in shared:
        found = [entry["metrics"][metric] for entry in entries]
        sizes = [entry["n"] for entry in entries]
        for kind, weights in (("", [n / count for n in sizes]), (" macro", [1 / len(entries)] * len(entries))):
            value = sum(w * m["value"] for w, m in zip(weights, found, strict=True))
            errors = [m["stderr"] for m in found]
            error = math.hypot(*(w * e for w, e in zip(weights, errors, strict=True))) if None not in errors else None
            chances = [m["chance"] for m in found]
            chance = sum(w * c for w, c in zip(weights, chances, strict=True)) if None not in chances else None
            metrics[metric + kind] = proportion(value, error, chance, count)
    out: dict[str, Any] = {"n": count, "metrics": metrics, "tasks": names, "group": group}
    for measured in ("bits_per_byte", "margin"):
        if all(measured in entry for entry in entries):
            out[measured] = sum(entry["n"] * entry[measured] for entry in entries) / count
    out["cut"] = sum(entry["cut"] for entry in entries)
    out["shots"] = entries[0]["shots"] if len({entry["shots"] for entry in entries}) == 1 else None
    return out


def right_choice(target: Any, choices: Sequence[str]) -> int | None:
    """Return which choice a task's target is, given by its number or its text; None if it is none of them."""
    if isinstance(target, str):
        stripped = [choice.strip() for choice in choices]
        return stripped.index(target.strip()) if target.strip() in stripped else None
    is_number = isinstance(target, int) and not isinstance(target, bool)
    return target if is_number and 0 <= target < len(choices) else None


def _outcome(sample: dict[str, Any]) -> Outcome | None:
    """Return a multiple-choice sample's outcome; None where its right answer is not one of its choices."""
    choices = [arguments[1] for arguments in sample["arguments"]]
    answer = right_choice(sample["target"], choices)
    values = tuple(float(response[0]) for response in sample["filtered_resps"])
    if answer is None or len(values) < 2:
        return None
    return Outcome(values, tuple(len(choice.encode()) for choice in choices), answer)


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Return what `samples/TASK.jsonl` holds of a question."""
    responses = sample["filtered_resps"]
    kept = {"id": sample["doc_id"], "prompt": sample["arguments"][0][0], "target": sample["target"]}
    if isinstance(responses[0], (tuple, list)):
        kept["choices"] = [arguments[1] for arguments in sample["arguments"]]
        kept["log_likelihoods"] = [response[0] for response in responses]
    else:
        kept["answer"] = responses[0]
    return kept | {"filter": sample["filter"]} | {metric: sample[metric] for metric in sample["metrics"]}
