"""A folder of shards: built under another name, described, and put in the place of what was there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from yaongi.data.shards import MANIFEST, TEXT, TOKEN_BYTES, Shard, ShardSet, write_manifest
from yaongi.data.tokenizer import Tokenizer
from yaongi.files import sha256_file

_BUILDING = ".building"  # suffix of the folder that is being built


def finished(out: Path, plan: dict[str, Any], kind: str = TEXT) -> dict[str, Any] | None:
    """Return the manifest of a whole folder that was made by the same plan; None if there is no such folder."""
    if not (out / MANIFEST).is_file():
        return None
    try:
        manifest = ShardSet.open(out, kind=kind).manifest
    except (ValueError, FileNotFoundError):
        return None  # damaged: write it again
    return manifest if manifest.get("plan") == plan else None


@contextmanager
def built(out: Path) -> Iterator[Path]:
    """Give an empty folder to build; afterwards it takes the place of `out`. An error leaves `out` as it was."""
    place = out.resolve()  # where a link leads: the link stays
    building = place / _BUILDING if place.is_mount() else place.with_name(f"{place.name}{_BUILDING}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    yield building
    replace(place, building)


def write_description(
    folder: Path, tokenizer: Tokenizer, splits: dict[str, dict[str, list[Shard]]], **fields: Any
) -> None:
    """Write the tokenizer, the bytes of its ids, and the manifest; `fields` are added to it unchanged."""
    tokenizer.save(folder / "tokenizer")
    np.save(folder / TOKEN_BYTES, tokenizer.byte_lengths)
    write_manifest(
        folder,
        splits,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        token_bytes_sha256=sha256_file(folder / TOKEN_BYTES),
        token_bytes_size=(folder / TOKEN_BYTES).stat().st_size,
        **fields,
    )


def replace(out: Path, building: Path) -> None:
    """Put what was built in the place of what was there. A mount point can't be renamed: its content is replaced."""
    if building.parent == out:
        (out / MANIFEST).unlink(missing_ok=True)  # first to go and last to come: it describes complete files
        for path in sorted(building.iterdir(), key=lambda path: path.name == MANIFEST):
            former = out / path.name
            shutil.rmtree(former) if former.is_dir() else former.unlink(missing_ok=True)
            path.rename(former)
        building.rmdir()
        return
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    building.rename(out)
    shutil.rmtree(old, ignore_errors=True)
