"""The model: Mamba-2, experts, grouped-query attention and Engram."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from yaongi.model.config import EngramConfig, ModelConfig, load_preset

if TYPE_CHECKING:
    from yaongi.model.count import ParameterCounts, flops_per_token
    from yaongi.model.engram.compression import compression_map
    from yaongi.model.losses import Losses
    from yaongi.model.model import Yaongi

__all__ = [
    "EngramConfig",
    "Losses",
    "ModelConfig",
    "ParameterCounts",
    "Yaongi",
    "compression_map",
    "flops_per_token",
    "load_preset",
]
_NEED_TORCH = {  # name: its module, imported when the name is first asked for, so that a command line does without
    "Losses": "losses",
    "ParameterCounts": "count",
    "Yaongi": "model",
    "compression_map": "engram.compression",
    "flops_per_token": "count",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
