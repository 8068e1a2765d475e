"""Starting a run from other weights: those of a model folder, or a checkpoint of another run with its momenta.

From a checkpoint also come the master weights and all of the optimizer's state, and the position in the data where the
new run reads the same data in the same order. Steps and schedule count anew.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yaongi.files import sha256_file
from yaongi.model import ModelConfig, Yaongi
from yaongi.model.hub.checkpoint_folders import CHECKPOINTS, TOKENIZER, checkpoints_in, find_weights, is_checkpoint
from yaongi.model.hub.folder import read_config, read_weights
from yaongi.train.checkpoint.checkpoints import DamagedError, read_meta

MAY_DIFFER = ("precision", "max_sequence_length", "attention_backend", "stop_token_ids", "compressed_vocab_size")


@dataclass(frozen=True)
class Origin:
    """What a run starts from."""

    folder: Path  # a checkpoint, or a model folder
    meta: dict[str, Any] | None  # the checkpoint's; None for a model folder

    def lineage(self) -> list[dict[str, Any]]:
        """Return the origins of a run that starts here, the oldest first, with all steps and tokens until then."""
        if self.meta is None:
            return [{"folder": str(self.folder.resolve()), "at": None, "steps": 0, "tokens": 0}]
        config, step = self.meta["config"], int(self.meta["step"])
        before = config.get("lineage", [])
        last = before[-1] if before else {"steps": 0, "tokens": 0}
        tokens = last["tokens"] + step * config["train"]["batch_tokens"]
        mine = {"folder": str(self.folder.resolve()), "at": step, "steps": last["steps"] + step, "tokens": tokens}
        return [*before, mine]


def find_origin(init: Path, step: int, out: Path) -> Origin:
    """Return what `--init` and `--init-step` name.

    Args:
        init: a model folder, a run (its newest checkpoint) or a checkpoint.
        step: the checkpoint of this step of a run; 0: the newest.
        out: the folder of the new run.

    Raises:
        ValueError: it is the new run's own folder, or has no checkpoint of that step, or a damaged one.
        FileNotFoundError: there is neither a model nor a checkpoint.
    """
    if step:
        kept = checkpoints_in(init / CHECKPOINTS)
        if step not in kept:
            steps = ", ".join(map(str, sorted(kept))) or "none"
            raise ValueError(f"train: --init-step must be one of the steps kept in {init} ({steps}), got {step}")
        folder = kept[step]
    else:
        folder = find_weights(init)
    if out.resolve() in (init.resolve(), *folder.resolve().parents):
        raise ValueError(f"train: --init must be outside the folder of the new run, got {init} for --out {out}")
    if is_checkpoint(folder):
        return Origin(folder, read_meta(folder))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"train: --init must be a model folder, a run or a checkpoint, got {init}")
    return Origin(folder, None)


def check_origin(origin: Origin, model: ModelConfig, tokenizer_hash: str, matrix_optimizer: str) -> None:
    """Raise ValueError, with what differs, if a run of this model can't start from there."""
    theirs, mine = (dataclasses.asdict(config) for config in (read_config(origin.folder)[0], model))
    differing = [f"{key}: {theirs[key]} there, {mine[key]} here" for key in mine if mine[key] != theirs[key]]
    differing = [line for line in differing if line.split(":")[0] not in MAY_DIFFER]
    if differing:
        raise ValueError(f"train: --init must be of the same model, got another ({'; '.join(differing)})")
    most, got = theirs["max_sequence_length"], model.max_sequence_length
    if got < most:  # no weight depends on it: the model would only lose what it can read, most likely to a preset
        wanted = f"{most} or more, that of --init; --row-tokens may be less"
        raise ValueError(f"train: --model.max-sequence-length must be {wanted}, got {got}")
    file = origin.folder / TOKENIZER
    found = origin.meta["tokenizer"] if origin.meta else sha256_file(file) if file.is_file() else tokenizer_hash
    if found != tokenizer_hash:
        raise ValueError(
            f"train: --init must be of --data's tokenizer {tokenizer_hash[:12]}, got {origin.folder} of {found[:12]}"
        )
    by = origin.meta["config"]["train"]["matrix_optimizer"] if origin.meta else matrix_optimizer
    if by != matrix_optimizer:
        raise ValueError(f"train: --matrix-optimizer must be {by}, that of --init, got {matrix_optimizer}")


def take_weights(origin: Origin | None, model: Yaongi) -> None:
    """Fill a model from the model folder that a run starts from, if it is one; errors as in `taking_over`."""
    if origin is not None and origin.meta is None:
        with taking_over(model), torch.no_grad():
            read_weights(origin.folder, model.state_dict())


@contextmanager
def taking_over(model: Yaongi) -> Iterator[None]:
    """Load an origin's weights within the block. Raise ValueError for damage, or for another map of Engram's ids."""
    table = model.backbone.compression
    before = None if table is None else table.clone()
    try:
        yield
    except DamagedError as error:
        raise ValueError(f"{error}; --init-step names another checkpoint") from error
    if table is not None and before is not None and not torch.equal(table, before):
        raise ValueError("train: --init must be of the same --engram-compression and tokenizer, got another map of ids")
