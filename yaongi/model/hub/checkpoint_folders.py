"""A run's folder and its checkpoints: where the weights, the configuration and the tokenizer are.

A run's folder holds `checkpoints/`, with a folder `step-00001200/` for each checkpoint and the file `latest`, which
names the newest. A checkpoint's `run.json` has the configuration.
"""

import re
from pathlib import Path
from typing import Any

from yaongi.files import find_damage, read_json, sha256_file

CHECKPOINTS, LATEST = "checkpoints", "latest"
META, METADATA = "run.json", ".metadata"  # a checkpoint's files: what JSON can hold, and the list of its tensors
METRICS = "metrics.jsonl"  # the run's record
TOKENIZER = "tokenizer.model"
_NAME = re.compile(r"step-(\d{8,})")


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return the folders of all complete checkpoints in `folder`, by step."""
    if not folder.is_dir():
        return {}
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match}


def is_checkpoint(folder: Path) -> bool:
    """Return whether `folder` is a checkpoint."""
    return (folder / META).is_file() and (folder / METADATA).is_file()


def find_weights(folder: Path) -> Path:
    """Return the folder to read a model from: of a run the newest checkpoint, else its model; any other folder itself.

    Raises:
        FileNotFoundError: the run has neither.
    """
    if is_checkpoint(folder):
        return folder
    kept = checkpoints_in(folder / CHECKPOINTS)
    if kept:
        pointer = folder / CHECKPOINTS / LATEST
        name = pointer.read_bytes().decode(errors="replace").strip() if pointer.is_file() else ""
        return next((path for path in kept.values() if path.name == name), kept[max(kept)])
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if (folder / CHECKPOINTS).is_dir():
        raise FileNotFoundError(f"from_pretrained: folder must hold a checkpoint or a model, got the run {folder}")
    return folder


def said_weights(given: Path, found: Path) -> str:
    """Return a line that names the checkpoint that stands for the run `given`; empty where nothing was chosen."""
    return "" if given == found else f"weights: {found}\n"


def run_config(folder: Path) -> dict[str, Any]:
    """Return the training configuration of a checkpoint, or of a run's model folder; empty for another model."""
    if is_checkpoint(folder):
        return dict(_meta(folder)["config"])
    beside = folder.resolve().parent / "config.json"
    fields = read_json(beside) if folder.name == "model" and beside.is_file() else {}
    return fields if "train" in fields else {}


def run_of(folder: Path) -> tuple[Path, int | None]:
    """Return the run of a checkpoint or of a model folder, and the checkpoint's step; it may not be there."""
    here = folder.resolve()
    found = _NAME.fullmatch(here.name) if is_checkpoint(folder) else None
    return (here.parents[1], int(found[1])) if found else (here.parent, None)


def tokenizer_folder(folder: Path) -> Path:
    """Return the folder with the tokenizer of a model or checkpoint: for checkpoints of earlier versions another one.

    Those hold none; the run's model folder may, and the token shards, if they are still there.
    """
    if not is_checkpoint(folder) or (folder / TOKENIZER).is_file():
        return folder
    wanted = _meta(folder).get("tokenizer")
    for place in (folder.resolve().parents[1] / "model", Path(run_config(folder)["run"]["data"]) / "tokenizer"):
        if (place / TOKENIZER).is_file() and sha256_file(place / TOKENIZER) == wanted:
            return place
    return folder


def _meta(checkpoint: Path) -> dict[str, Any]:
    """Return what `run.json` holds. Raises ValueError if it is damaged or lacks what every checkpoint has."""
    damage = find_damage(checkpoint, names=(META,))
    meta = {} if damage else read_json(checkpoint / META)
    if "config" not in meta:
        raise ValueError(f"checkpoint: {checkpoint} is damaged: {damage or f'{META} has no configuration'}")
    return meta
