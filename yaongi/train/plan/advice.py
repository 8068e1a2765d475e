"""Advice on settings that need less memory, for the plan and for a run that exhausts GPU memory."""

from collections.abc import Callable, Iterator
from types import TracebackType

import torch

from yaongi.train.recompute import CHEAPEST, MOST

PARTS = {  # the module that ran out of memory, the innermost of the traceback listed here: its name in the message
    "yaongi.kernels.causal_conv1d": "a Mamba layer",
    "yaongi.kernels.mamba_core": "a Mamba layer",
    "yaongi.kernels.mamba_scan": "a Mamba layer",
    "yaongi.kernels.moe": "an expert layer",
    "yaongi.kernels.newton_schulz": "the optimizer",
    "yaongi.model.mixers.attention": "an attention layer",
    "yaongi.model.mixers.attention_backends": "an attention layer",
    "yaongi.model.engram": "an Engram",
    "yaongi.model.sampling": "a sample",
    "yaongi.model.losses": "the loss",
    "yaongi.model.mixers.mamba2": "a Mamba layer",
    "yaongi.model.mixers.moe": "an expert layer",
    "yaongi.model.mixers.router": "an expert layer",
    "yaongi.train.build": "the model's weights",
    "yaongi.train.checkpoint": "a checkpoint",
    "yaongi.train.evaluation": "an evaluation",
    "yaongi.train.optimizer": "the optimizer",
}


def advise(
    share: int,
    rows: int,
    recompute: str,
    fits: Callable[[int, str], bool] = lambda rows, recompute: True,
    enough: Callable[[], int] = lambda: 0,
) -> str:
    """Return the settings to try next instead of micro-batches of `rows` rows and the policy `recompute`.

    Args:
        share: rows per step and process; micro-batches must divide it.
        fits: predicts whether such settings fit into memory; by default all do.
        enough: predicts the number of GPUs with which the run fits if no settings help; 0 if that isn't known.
    """
    for fewer, policy in _smaller(share, rows, recompute):
        if fits(fewer, policy):
            return f"try --micro-rows {fewer}" + (f" --recompute {policy}" if policy != recompute else "")
    return f"try {enough() or 'more'} GPUs (torchrun), shorter rows (--row-tokens) or a smaller preset"


def explain_out_of_memory(error: torch.OutOfMemoryError, share: int, rows: int, recompute: str) -> str:
    """Return one line: the part of the step, how much memory it needed, and what to try instead of these settings."""
    size = str(error).partition(". GPU")[0].rpartition("allocate ")[2] or "more"
    return f"out of GPU memory in {_part(error.__traceback__)}, which needed {size}: {advise(share, rows, recompute)}"


def _smaller(share: int, rows: int, recompute: str) -> Iterator[tuple[int, str]]:
    """Yield settings that need less memory, those that cost the least time first."""
    yield from ((fewer, recompute) for fewer in range(rows - 1, 0, -1) if share % fewer == 0)
    policies = [CHEAPEST, MOST]
    yield from ((1, policy) for policy in policies[policies.index(recompute) + 1 if recompute in policies else 0 :])


def _part(trace: TracebackType | None) -> str:
    part = "the backward pass"  # of torch's own ops: the traceback then has no frame of the modules in PARTS
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        part = next((name for start, name in PARTS.items() if f"{module}.".startswith(f"{start}.")), part)
        trace = trace.tb_next
    return part
