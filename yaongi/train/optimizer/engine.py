"""What several processes do together, by the way that the plan chose."""

from collections.abc import Callable

import torch

from yaongi.model import Yaongi
from yaongi.model.initialize import PartOf, all_rows
from yaongi.train.config import Training
from yaongi.train.distributed.experts import ExpertRanks
from yaongi.train.distributed.replicas import Replicas
from yaongi.train.distributed.sharding import Shards, own_part, shard
from yaongi.train.optimizer.partition import divide_experts, divide_parameters
from yaongi.world import World


def make_engine(
    model: Yaongi,
    train: Training,
    world: World,
    parallel: str,
    degree: int,
    dtype: torch.dtype,
    fill: Callable[[PartOf], None],
) -> Replicas | Shards:
    """Divide a model's weights, or what is to be updated of them, among the processes, and give them their values.

    Args:
        model: may be on the meta device, so that no process needs memory for more than its part.
        parallel: replicate, experts or fsdp.
        degree: processes over which experts are spread.
        dtype: of the model's weights.
        fill: gives the model memory and values; it is told which rows of a parameter are here.
    """
    if parallel == "fsdp":
        shard(model, model.backbone.layers, ("losses", "hidden_states"), world)
        fill(own_part)
        return Shards(model, world, dtype)
    if parallel == "replicate":
        fill(all_rows)
        return Replicas(model, world, divide_parameters(model, train, world.size))
    experts = ExpertRanks(world, degree, divide_experts(model, world.size, degree))
    ownership = divide_parameters(model, train, world.size, experts_apart=True)
    experts.spread(model)
    fill(experts.part_in(model))
    return Replicas(model, world, ownership, experts)
