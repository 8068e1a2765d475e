"""lm-eval's multiple-choice tasks as questions of our own form, for scores in the middle of a training run."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from yaongi.eval.choices import Item
from yaongi.eval.harness.run_tasks import SEED, right_choice


def task_items(tasks: Mapping[str, Any], shots: int | None) -> list[Item]:
    """Return the questions of loaded tasks, with the prompts that `run_tasks` would use.

    Args:
        shots: examples in the prompt; a task that says 0 gets none.

    Raises:
        ValueError: a task is not of multiple choice.
    """
    items = []
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "multiple_choice":
            raise ValueError(
                f"eval: {name} must be of multiple choice to be scored in training, got {task.OUTPUT_TYPE}"
            )
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEED)
        task.build_all_requests(rank=0, world_size=1)
        by_question: dict[int, list[Any]] = defaultdict(list)
        for instance in task.instances:
            by_question[instance.doc_id].append(instance)
        for instances in by_question.values():
            instances.sort(key=lambda instance: instance.idx)
            context, choices = instances[0].args[0], tuple(instance.args[1] for instance in instances)
            answer = right_choice(task.doc_to_target(instances[0].doc), choices)
            if answer is not None and all(instance.args[0] == context for instance in instances):
                items.append(Item(name, context, choices, answer))
    return items
