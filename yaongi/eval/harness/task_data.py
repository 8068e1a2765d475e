"""The tasks of lm-eval and their data sets: found, loaded from the cache or from local copies, and described."""

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._yaml_loader import load_yaml

from yaongi.data.sources.patience import unavailable_errors

LOGGERS = ("lm_eval", "datasets", "huggingface_hub")


class Factory(TaskFactory):
    """A maker of tasks that reads local copies of data sets, and runs no code unless it may."""

    def __init__(self, data_root: Path | None, allow_code: bool) -> None:
        super().__init__()
        self._root, self._allow_code = data_root, allow_code

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return a task's configuration, with the path of its local copy."""
        raw = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {}
        if raw.get("unsafe_code") and not self._allow_code:
            raise CodeError(
                f"eval: {entry.name} runs code that the model writes, without a sandbox: it needs --allow-code"
            )
        config = super()._load_full_config(entry, overrides)
        path = config.get("dataset_path")
        if self._root is not None and isinstance(path, str) and path != "json":
            copy = next((p for p in (self._root / path, self._root / path.split("/")[-1]) if p.is_dir()), None)
            if copy is None:
                raise FileNotFoundError(f"eval: --data-root must hold {path}, got {self._root}")
            config["dataset_path"] = str(copy)
        return config


class CodeError(ValueError):
    """A task needs code execution, and `--allow-code` was not given."""


def task_manager(
    names: Sequence[str], *, include: Path | None = None, data_root: Path | None = None, allow_code: bool = False
) -> TaskManager:
    """Return lm-eval's index of tasks, in which all names must be.

    Args:
        include: a folder of further tasks; where it has all names, lm-eval's own ones are not read.
        data_root: a folder of local copies of data sets, `OWNER/NAME` or `NAME`.

    Raises:
        ValueError: there is no task or group of a name.
    """
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    manager = TaskManager(include_path=include, include_defaults=False) if include is not None else None
    if manager is None or any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=include)
    unknown = next((name for name in names if name not in manager.all_tasks), None)
    if unknown is not None:
        near = [name for name in manager.all_tasks if name.startswith(unknown[:5])][:8]
        hint = f"; there are {', '.join(near)}" if near else ""
        raise ValueError(f"eval: --tasks must be names of lm-eval's tasks, got {unknown!r}{hint}")
    manager._factory = Factory(data_root, allow_code)
    return manager


def load_tasks(manager: TaskManager, name: str) -> dict[str, Any]:
    """Return the tasks of a name, itself or a group's, with their data.

    Raises:
        ValueError: a data set is not in the cache and can't be fetched; the message says how to get it.
    """
    try:
        return dict(manager.load([name])["tasks"])
    except CodeError:
        raise
    except unavailable_errors() as error:
        found = " ".join(str(error).split())
        advice = f"fetch it once with: python -m yaongi.eval fetch --tasks {name}"
        raise ValueError(f"eval: the data of {name} must be in the cache, got: {found[:300]}; {advice}") from error


def revision(task: Any) -> str | None:
    """Return the revision of a task's data set, which its cached files' path names; None for local files."""
    for split in getattr(task, "dataset", None) or {}:
        for file in getattr(task.dataset[split], "cache_files", []):
            if hexadecimal := re.search(r"/([0-9a-f]{40})/", file["filename"]):
                return hexadecimal[1]
    return None


def fetch(names: Sequence[str], manager_of: Callable[[Sequence[str]], TaskManager], say: Callable[[str], None]) -> int:
    """Load every data set once, so that it is in the cache, and print a line each; return how many can't be had."""
    failed = 0
    manager = manager_of(names)
    for name in names:
        try:
            for task, loaded in load_tasks(manager, name).items():
                rows = ", ".join(f"{split} {len(part):,}" for split, part in loaded.dataset.items())
                say(f"{task}: {rows} rows of {loaded.config.dataset_path} at {revision(loaded) or 'no revision'}")
        except ValueError as error:
            say(f"{name}: NOT fetched: {error}")
            failed += 1
    return failed
