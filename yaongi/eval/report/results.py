"""`results.json` of an evaluation: written by its commands, read by its table and page.

version   1
model     name, folder, weights and tokenizer (SHA-256), parameters, trained_tokens or null
runs      one entry per command: date, seconds, versions, dtype, device, processes, rows_per_pass, row_tokens, fill,
          tokens, tokens_per_second, prompts cut, boundary mismatches, prefix, chat (hash of the template), seed
tasks     by name: n, shots, limit, chat, run (index into runs), metrics (value, stderr, chance, distance from it in
          standard errors of guessing), bits_per_byte of the right answer, margin in nats, cut (prompts), version,
          data and revision; of a group also its tasks, and each metric over questions and (macro) over tasks
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from yaongi.data.tokenizer import Tokenizer
from yaongi.files import read_json, read_json_lines, sha256_file, write_atomically, write_json
from yaongi.model import Yaongi
from yaongi.model.hub.checkpoint_folders import META, METRICS, is_checkpoint, run_config

VERSION = 1
RESULTS = "results.json"
SAMPLES = "samples"


def describe_model(folder: Path, model: Yaongi, tokenizer: Tokenizer, trained_tokens: int | None) -> dict[str, Any]:
    """Return what identifies a model folder or a checkpoint.

    Args:
        trained_tokens: tokens that it has seen; None for those that its run's files tell.

    Raises:
        ValueError: a line of its run's log is damaged, and `trained_tokens` is None.
    """
    resolved = folder.resolve()
    if is_checkpoint(folder):
        name, pattern = resolved.parents[1].name, "*.distcp"
    else:
        name, pattern = resolved.parent.name if resolved.name == "model" else resolved.name, "*.safetensors"
    hashes = [sha256_file(path) for path in sorted(folder.glob(pattern))]
    return {
        "name": name,
        "folder": os.fspath(folder),
        "weights": hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "tokenizer": tokenizer.hash,
        "parameters": model.count_parameters().total,
        "trained_tokens": _trained_tokens(resolved) if trained_tokens is None else trained_tokens,
    }


def read_results(folder: Path) -> dict[str, Any]:
    """Read a folder's results.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is damaged or of another version.
    """
    path = folder / RESULTS
    if not path.is_file():
        made = "python -m yaongi.eval tasks RUN/model --out EVAL"
        raise FileNotFoundError(f"eval: folder must hold {RESULTS}, got {folder}; {made} writes it")
    found = read_json(path)
    if found.get("version") != VERSION:
        raise ValueError(f"eval: version of {path} must be {VERSION}, got {found.get('version')}")
    return found


def check_same_model(folder: Path, model: Mapping[str, Any]) -> None:
    """Raise ValueError if the folder holds results of another model."""
    if (folder / RESULTS).is_file():
        held = read_results(folder)["model"]
        if (held["weights"], held["tokenizer"]) != (model["weights"], model["tokenizer"]):
            raise ValueError(
                f"eval: --out must hold no results of another model, got {folder} with those of {held['name']}"
            )


def add_results(
    folder: Path, model: Mapping[str, Any], run: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Add a run to a folder's results; tasks that were there already are replaced. Return all of them."""
    check_same_model(folder, model)
    found: dict[str, Any] = {"version": VERSION, "runs": [], "tasks": {}}
    if (folder / RESULTS).is_file():
        found = read_results(folder)
    found["model"] = dict(model)
    found["runs"].append(dict(run))
    found["tasks"] |= {name: {**entry, "run": len(found["runs"]) - 1} for name, entry in tasks.items()}
    write_json(folder / RESULTS, found)
    return found


def write_samples(folder: Path, samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Write `samples/TASK.jsonl`: every prompt with its answers, their log-likelihoods and the verdict."""
    (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
    for task, lines in samples.items():
        text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        write_atomically(folder / SAMPLES / f"{task.replace('/', '_')}.jsonl", text.encode())


def _trained_tokens(folder: Path) -> int | None:
    """Return the tokens until a checkpoint, or until the last step in the log beside a model; None without a log."""
    if is_checkpoint(folder):
        return int(read_json(folder / META)["step"]) * int(run_config(folder)["train"]["batch_tokens"])
    log = folder.parent / METRICS
    steps = [record for record in read_json_lines(log) if record.get("event") == "step"] if log.is_file() else []
    return steps[-1].get("tokens") if steps else None
