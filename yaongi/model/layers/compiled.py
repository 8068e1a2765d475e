"""Elementwise functions that torch.compile fuses on a GPU."""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

_planning = False


@contextlib.contextmanager
def planned_for_gpu(enabled: bool = True) -> Iterator[None]:
    """Keep on the meta device what a GPU would keep, within the block: a plan of its memory counts that."""
    global _planning
    before, _planning = _planning, enabled
    try:
        yield
    finally:
        _planning = before


def on_gpu(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is on a GPU, or on the meta device in its place."""
    return tensor.is_cuda or (tensor.is_meta and _planning)


def compiled(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """Return the function, on a GPU compiled into a few passes over memory, which keep its arguments alone."""
    if device_type == "meta" and _planning:
        return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return _compiled(function) if device_type == "cuda" else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
