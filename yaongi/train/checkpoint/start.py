"""Where a run starts: at a checkpoint of its own, from another run's or a model's weights, or from nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaongi.train.checkpoint.branch import Origin, check_origin, find_origin
from yaongi.train.checkpoint.checkpoints import Checkpoints
from yaongi.train.checkpoint.resume import changes, find_run
from yaongi.train.config import Config
from yaongi.train.metrics.records import Metrics


@dataclass(frozen=True)
class Start:
    """The checkpoint to go on from with its `meta`, or what a new run starts from; both None for initial weights."""

    found: tuple[Path, dict[str, Any]] | None
    origin: Origin | None

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """What the run descends from, the oldest first; see `Origin.lineage`."""
        if self.found is not None:
            return self.found[1]["config"].get("lineage", [])
        return self.origin.lineage() if self.origin else []

    @property
    def steps_before(self) -> int:
        """Steps of the runs that this one descends from."""
        return int(self.lineage[-1]["steps"]) if self.lineage else 0


def find_start(config: Config, checkpoints: Checkpoints, record: dict[str, Any], tokenizer_hash: str) -> Start:
    """Return where a run of this configuration starts.

    Args:
        record: `as_dict` of the configuration.

    Raises:
        DamagedError, ValueError, FileNotFoundError: it can't start there, or there is nothing to start from.
    """
    run = config.run
    if run.init_step and run.init is None:
        raise ValueError(f"train: --init-step must go with --init, got {run.init_step} alone")
    found = None if run.fresh else find_run(run.out, checkpoints, record, run.from_step)
    if found is not None:
        if run.init is not None and not found[1]["config"].get("lineage"):
            raise ValueError(f"train: --init must go with a folder of its own, got the run {run.out}")
        return Start(found, None)
    if run.init is not None:
        origin = find_origin(run.init, run.init_step, run.out)
        check_origin(origin, config.model, tokenizer_hash, config.train.matrix_optimizer)
        return Start(None, origin)
    if run.skip_batches:
        raise ValueError(f"train: --skip-batches must go with a run to go on with, got none in {run.out}")
    return Start(None, None)


def note_start(
    start: Start, config: Config, record: dict[str, Any], skipped: range, metrics: Metrics, say: Callable[[str], None]
) -> None:
    """Record and say what sets this start apart: another origin, an older step, other settings, batches left out.

    Args:
        skipped: the samples left out.
    """
    step = int(start.found[1]["step"]) if start.found else 0
    if start.origin is not None:
        metrics.write("init", step, **start.lineage[-1])
        say(f"started from {start.origin.folder}")
    if start.found is not None:
        if step < config.train.steps:
            say(f"resumed from step {step} of {config.run.out}")
        else:
            say(f"{config.run.out} has done all of its {step} steps: its model and report are written again")
        if config.run.from_step:
            metrics.write("from_step", step)
        changed = changes(start.found[1]["config"], record)
        if changed and step < config.train.steps:
            metrics.write("changed", step, fields=changed)
            told = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
            say(f"changed since the checkpoint: {told}")
    if skipped:
        first, last = skipped.start, skipped.stop - 1
        metrics.write("skip_batches", step, batches=config.run.skip_batches, samples=[first, last])
        say(f"left out: samples {first}-{last}, {config.run.skip_batches} batches")
