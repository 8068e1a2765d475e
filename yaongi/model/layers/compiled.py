"""Passes over memory that torch.compile makes one of."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def compiled(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """The function; on a GPU compiled into a few passes."""
    return torch.compile(function) if device_type == "cuda" else function
