"""Elementwise functions that torch.compile fuses on a GPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def compiled(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """Return the function, on a GPU compiled into a few passes over memory."""
    return torch.compile(function) if device_type == "cuda" else function
