"""Which checkpoint a run resumes from, and whether its configuration allows that."""

from pathlib import Path
from typing import Any

from yaongi.model import Yaongi
from yaongi.train.checkpoint.checkpoints import Checkpoints, read_meta, step_of

FREE = ("precision",)  # fields of the model that may change when a run is resumed


def find_run(
    folder: Path, checkpoints: Checkpoints, config: dict[str, Any], step: int = 0
) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to go on from of the run in `folder`, and its `meta`; None if there is no checkpoint.

    Args:
        step: go on from the checkpoint of this step; 0: from the newest.

    Raises:
        DamagedError: what `latest` names, or the checkpoint's `meta`, can't be read.
        ValueError: that run has another configuration (the message shows what differs), or no checkpoint of `step`.
    """
    path = checkpoints.at(step) if step else checkpoints.latest()
    if path is None:
        return None
    try:
        meta = read_meta(path)
    except ValueError as error:
        raise checkpoints.damaged(str(error).removeprefix("checkpoint: "), step_of(path)) from error
    differing = differences(meta["config"], config)
    if differing:
        raise ValueError(
            f"train: {folder} holds a run of another configuration ({'; '.join(differing)}); "
            "--out names another folder, --fresh removes this run"
        )
    return path, meta


def differences(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Return the differences between two configs (from `as_dict`) in `model` and `train`, one line each.

    The precision may differ: a checkpoint holds float32 weights whatever was multiplied in FP8.
    """
    lines = []
    for part in ("model", "train"):
        old, new = saved.get(part, {}), asked.get(part, {})
        for key in sorted(old.keys() | new.keys()):
            if key not in FREE and old.get(key) != new.get(key):
                lines.append(f"{part}.{key}: the run has {old.get(key)}, got {new.get(key)}")
    return lines


def fp8_sites(model: Yaongi) -> list[str]:
    """Return the names of the FP8 casts, whose history a checkpoint holds; none without FP8."""
    return [] if model.fp8_scales is None else list(model.fp8_scales.sites)


def compare_sites(saved: list[str], here: list[str]) -> str:
    """Return what to say where one side has FP8 and the other doesn't; empty where both agree.

    Raises:
        ValueError: both have FP8, at other sites.
    """
    if saved and here and saved != here:
        raise ValueError(
            f"checkpoint: scales must be those of {len(here)} fp8 sites, got {len(saved)} "
            "(saved with other precision fields)"
        )
    if here and not saved:
        return "the checkpoint was trained without fp8: the first micro-batch calibrates the scales"
    return "the checkpoint was trained in fp8: the run goes on without it" if saved and not here else ""
