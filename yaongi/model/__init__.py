"""The model: Mamba-2, experts, grouped-query attention and Engram."""

from yaongi.model.compression import compression_map
from yaongi.model.config import EngramConfig, ModelConfig, PrecisionConfig, load_preset
from yaongi.model.count import Counts, count_parameters, flops_per_token
from yaongi.model.losses import Losses
from yaongi.model.model import Yaongi

__all__ = [
    "Counts",
    "EngramConfig",
    "Losses",
    "ModelConfig",
    "PrecisionConfig",
    "Yaongi",
    "compression_map",
    "count_parameters",
    "flops_per_token",
    "load_preset",
]
