"""Room on the disk for all that a run will keep: its checkpoints, the one being written beside them, and its model."""

import errno
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

MARGIN = 1.05  # room that files need, as a multiple of their tensors' bytes


def kept_of(steps: Iterable[int], keep_last: int, keep_every: int) -> set[int]:
    """Return which checkpoints stay, of the given steps."""
    ordered = sorted(steps)
    return set(ordered[-keep_last:]) | {step for step in ordered if keep_every and step % keep_every == 0}


def most_checkpoints(there: Iterable[int], saves: Iterable[int], keep_last: int, keep_every: int) -> tuple[int, int]:
    """Return how many checkpoints are on the disk at most, with the one being written, and how many at the end.

    Args:
        there: steps of those that are there.
        saves: steps at which others will be saved, ascending.
    """
    kept = set(there)
    most = len(kept)
    for step in saves:
        most = max(most, len(kept | {step}) + (step in kept))  # it replaces one of its own step only when it is whole
        kept = kept_of({s for s in kept if s <= step} | {step}, keep_last, keep_every)
    return most, len(kept)


def check_room(checkpoints: Path, model: Path, counts: tuple[int, int, int], sizes: tuple[int, int]) -> None:
    """Check the disks of both folders before the first step.

    Args:
        counts: checkpoints that are there, that will be there at most, and at the end.
        sizes: bytes of a checkpoint's tensors, and of the model's.

    Raises:
        OSError: there is too little room.
    """
    there, most, final = counts
    places = [_existing(folder) for folder in (checkpoints, model)]
    disks = [os.stat(place).st_dev for place in places]
    during, after = Counter({disks[0]: (most - there) * sizes[0]}), Counter({disks[0]: (final - there) * sizes[0]})
    after[disks[1]] += sizes[1]
    for place, disk in zip(places, disks, strict=True):
        wanted, free = MARGIN * max(during[disk], after[disk]), shutil.disk_usage(place).free
        if free < wanted:
            what = f"{most} checkpoints of {sizes[0] / 1e9:.3f} GB and a model of {sizes[1] / 1e9:.3f} GB"
            short = f"must have {wanted / 1e9:.3f} GB free for all that the run keeps, got {free / 1e9:.3f} GB"
            advice = "--keep-last, --keep-every and --checkpoint-every say how many checkpoints"
            raise OSError(errno.ENOSPC, f"train: {place} {short} ({what}; {advice})")


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest of its parents that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
