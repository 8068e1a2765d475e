"""Which settings need less memory: said by the plan, and where a GPU runs out of it."""

from collections.abc import Callable, Iterator
from types import TracebackType

import torch

from yaongi.train.recompute import CHEAPEST, MOST

PARTS = {  # by the module whose code was running; the innermost that fits
    "yaongi.kernels.causal_conv1d": "a Mamba layer",
    "yaongi.kernels.mamba_core": "a Mamba layer",
    "yaongi.kernels.mamba_scan": "a Mamba layer",
    "yaongi.kernels.moe": "an expert layer",
    "yaongi.kernels.newton_schulz": "the optimizer",
    "yaongi.model.mixers.attention": "an attention layer",
    "yaongi.model.mixers.attention_backends": "an attention layer",
    "yaongi.model.engram": "an Engram",
    "yaongi.model.generation": "a sample",
    "yaongi.model.losses": "the loss",
    "yaongi.model.mixers.mamba2": "a Mamba layer",
    "yaongi.model.mixers.moe": "an expert layer",
    "yaongi.model.mixers.router": "an expert layer",
    "yaongi.train.build": "the model's weights",
    "yaongi.train.checkpoint": "a checkpoint",
    "yaongi.train.evaluation": "an evaluation",
    "yaongi.train.optimizer": "the optimizer",
}
LAST_RESORT = "try more GPUs (torchrun), shorter rows (--row-tokens) or a smaller preset"


def advise(
    share: int, rows: int, recompute: str, fits: Callable[[int, str], bool] = lambda rows, recompute: True
) -> str:
    """The next settings to try instead of micro-batches of `rows` rows and the policy `recompute`.

    Args:
        share: rows of a step and process, which micro-batches divide.
        fits: whether settings fit into memory, where that can be predicted.
    """
    for fewer, policy in _smaller(share, rows, recompute):
        if fits(fewer, policy):
            return f"try --micro-rows {fewer}" + (f" --recompute {policy}" if policy != recompute else "")
    return LAST_RESORT


def explain_out_of_memory(error: torch.OutOfMemoryError, share: int, rows: int, recompute: str) -> str:
    """One line: the part of the step, what it asked for, and what to try instead of these settings."""
    size = str(error).partition(". GPU")[0].rpartition("allocate ")[2] or "more"
    return f"out of GPU memory in {_part(error.__traceback__)}, which needed {size}: {advise(share, rows, recompute)}"


def _smaller(share: int, rows: int, recompute: str) -> Iterator[tuple[int, str]]:
    """Settings that need less memory, those that cost the least time first."""
    yield from ((fewer, recompute) for fewer in range(rows - 1, 0, -1) if share % fewer == 0)
    policies = [CHEAPEST, MOST]
    yield from ((1, policy) for policy in policies[policies.index(recompute) + 1 if recompute in policies else 0 :])


def _part(trace: TracebackType | None) -> str:
    part = "the backward pass"  # of an op of torch's own: no frame but the trainer's
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        part = next((name for start, name in PARTS.items() if f"{module}.".startswith(f"{start}.")), part)
        trace = trace.tb_next
    return part
