"""What several processes do together, by the way that the plan chose."""

import torch

from yaongi.model import Yaongi
from yaongi.train.config import Training
from yaongi.train.distributed.experts import ExpertRanks
from yaongi.train.distributed.replicas import Replicas
from yaongi.train.distributed.sharding import Shards, shard
from yaongi.train.optimizer.partition import divide_experts, divide_parameters
from yaongi.world import World


def make_engine(
    model: Yaongi, train: Training, world: World, parallel: str, degree: int, dtype: torch.dtype
) -> Replicas | Shards:
    """Divide a model's weights, or what is to be updated of them, among the processes.

    Args:
        parallel: replicate, experts or fsdp.
        degree: processes over which experts are spread.
        dtype: of the model's weights.
    """
    if parallel == "fsdp":
        shard(model, model.backbone.layers, ("losses", "hidden_states"), world)
        return Shards(model, world, dtype)
    if parallel == "replicate":
        return Replicas(model, world, divide_parameters(model, train, world.size))
    experts = ExpertRanks(world, degree, divide_experts(model, world.size, degree))
    experts.spread(model)
    return Replicas(model, world, divide_parameters(model, train, world.size, experts_apart=True), experts)
