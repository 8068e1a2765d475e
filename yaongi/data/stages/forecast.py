"""What a stage will take, said before it starts: disk, hours."""

import shutil
from pathlib import Path

SHARD_BYTES = 0.65  # of token shards with their index, per byte of text
PACKED_BYTES = 0.5  # of a download's parts, per byte of text


def check_disk(stage: str, folder: Path, wanted: float) -> None:
    """Raise OSError if the disk of `folder`, which need not exist, has less than `wanted` bytes free."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < wanted:
        raise OSError(f"{stage}: the disk of {folder} must have {size(wanted)} free, got {size(free)}")


def size(count: float) -> str:
    """Format bytes as in `57.0 GB`, `1.3 MB`."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Format as in `3.2 hours`, `12 minutes`."""
    minutes = max(1, round(seconds / 60))
    return f"{seconds / 3600:,.1f} hours" if minutes >= 90 else f"{minutes} minute{'s' if minutes > 1 else ''}"
