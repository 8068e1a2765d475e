"""Which checkpoint a run resumes from, and whether its configuration allows that."""

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

from yaongi.model import Yaongi
from yaongi.train.checkpoint.checkpoints import Checkpoints, read_meta, step_of
from yaongi.train.config import Running

MODEL_CHANGES = ("precision",)  # fields of the model that may change when a run is resumed
RATES = ("matrix_lr", "adam_lr", "table_lr_scale", "final_lr", "bias_travel", "bias_rate")
TRAIN_CHANGES = (*RATES, "clip", "bad_steps")
TUNE_CHANGES = ("lr_scale",)
ONCE = ("fresh", "from_step", "skip_batches")  # what to do at the start, once
NOT_TOLD = (*ONCE, "init", "init_step", "data", "out", "dry_run", "stop_after", "max_epochs", "allow_epochs")


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
        start = f"--init {shlex.quote(str(folder))} with another --out starts one from its weights"
        if any(line.startswith("model.") for line in differing):
            start = "another --out starts a new one"
        raise ValueError(
            f"train: {folder} holds a run of another configuration ({'; '.join(differing)}); "
            f"the run's own options go on with it, {start}"
        )
    return path, meta


def differences(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Return the differences between two configs (from `as_dict`) that a run can't go on with, one line each.

    The precision may differ: a checkpoint holds float32 weights whatever was multiplied in FP8.
    """
    lines = []
    for part, free in (("model", MODEL_CHANGES), ("train", TRAIN_CHANGES), ("tune", TUNE_CHANGES)):
        for key, (old, new) in _differing(saved, asked, part).items():
            if key not in free:
                lines.append(f"{part}.{key}: the run has {old}, got {new}")
    return lines


def changes(saved: dict[str, Any], asked: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the fields with which a run goes on though they differ: name, former and new value.

    Left out are folders, and what is done once, at the start.
    """
    return {
        f"{part}.{key}": list(values)
        for part in ("model", "train", "run")
        for key, values in _differing(saved, asked, part).items()
        if not (part == "run" and key in NOT_TOLD)
    }


def _differing(saved: dict[str, Any], asked: dict[str, Any], part: str) -> dict[str, tuple[Any, Any]]:
    old, new = saved.get(part, {}), asked.get(part, {})
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def launch_of(run: Running) -> dict[str, Any]:
    """Return what this start of the program does once, and torchrun's number of it, for a checkpoint's `meta`."""
    asked = {name: getattr(run, name) for name in ONCE}
    return {"id": os.environ.get("TORCHELASTIC_RUN_ID", ""), **asked}


def without_what_was_done(run: Running, checkpoints: Checkpoints) -> Running:
    """Return the settings for a restart by torchrun, which repeats the command line.

    What is done once, at the start, is left out if a checkpoint was saved after it: a restart with --fresh would remove
    that checkpoint, one with --from-step go back again.
    """
    newest = checkpoints.latest() if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else None
    if newest is None or read_meta(newest).get("launch") != launch_of(run):
        return run
    return dataclasses.replace(run, fresh=False, from_step=0, skip_batches=0)


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
