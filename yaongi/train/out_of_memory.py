"""What to say when a GPU runs out of memory: in which part of a step, and which setting to change."""

from types import TracebackType

import torch

from yaongi.train.recompute import CHEAPEST, MOST

PARTS = {  # by the module whose code was running; the innermost that fits
    "yaongi.kernels.causal_conv1d": "a Mamba layer",
    "yaongi.kernels.mamba": "a Mamba layer",
    "yaongi.kernels.moe": "an expert layer",
    "yaongi.kernels.newton_schulz": "the optimizer",
    "yaongi.model.attention": "an attention layer",
    "yaongi.model.engram": "an Engram",
    "yaongi.model.generation": "a sample",
    "yaongi.model.losses": "the loss",
    "yaongi.model.mamba2": "a Mamba layer",
    "yaongi.model.moe": "an expert layer",
    "yaongi.train.build": "the model's weights",
    "yaongi.train.checkpoint": "a checkpoint",
    "yaongi.train.evaluate": "an evaluation",
    "yaongi.train.optim": "the optimizer",
}


def explain(error: torch.OutOfMemoryError, micro_rows: int, recompute: str) -> str:
    """One line: the part, what it wanted, and what to try instead of these two settings."""
    wanted = str(error).partition(". GPU")[0].rpartition("allocate ")[2] or "more"
    return f"out of GPU memory in {_part(error.__traceback__)}, which wanted {wanted}: {_advice(micro_rows, recompute)}"


def _part(trace: TracebackType | None) -> str:
    part = "the backward pass"  # of an op of torch's own: no frame but the trainer's
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        part = next((name for start, name in PARTS.items() if module.startswith(start)), part)
        trace = trace.tb_next
    return part


def _advice(micro_rows: int, recompute: str) -> str:
    if micro_rows > 1:
        return f"try --micro-rows {micro_rows // 2}"
    if recompute != MOST:
        return f"try --recompute {CHEAPEST if recompute == 'none' else MOST}"
    return "try more GPUs (torchrun), shorter rows (--row-tokens) or a smaller preset"
