"""Which checkpoint a run resumes from, and whether its configuration allows that."""

from pathlib import Path
from typing import Any

from yaongi.train.checkpoint.checkpoints import Checkpoints, read_meta


def find_run(folder: Path, checkpoints: Checkpoints, config: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint of the run in `folder` and its `meta`; None if there is no checkpoint.

    Raises:
        ValueError: that run has another configuration; the message shows what differs.
    """
    latest = checkpoints.latest()
    if latest is None:
        return None
    meta = read_meta(latest)
    differing = differences(meta["config"], config)
    if differing:
        raise ValueError(
            f"train: {folder} holds a run of another configuration ({'; '.join(differing)}); "
            "--out names another folder, --fresh removes this run"
        )
    return latest, meta


def differences(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Return the differences between two configs (from `as_dict`) in `model` and `train`, one line each."""
    lines = []
    for part in ("model", "train"):
        old, new = saved.get(part, {}), asked.get(part, {})
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                lines.append(f"{part}.{key}: the run has {old.get(key)}, got {new.get(key)}")
    return lines
