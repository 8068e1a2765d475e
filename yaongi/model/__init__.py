"""The model: Mamba-2, experts, grouped-query attention and Engram."""

from yaongi.model.config import EngramConfig, ModelConfig, load_preset
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
