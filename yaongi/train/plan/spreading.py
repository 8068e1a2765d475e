"""Experts spread over processes, as a plan sees it: whether that is possible, and what it takes."""

from dataclasses import replace

from yaongi.model import ModelConfig, Yaongi
from yaongi.train.config import Running
from yaongi.train.optimizer.roles import parameter_roles
from yaongi.train.plan.scaling import PER_NODE, StepCost
from yaongi.train.recompute import recomputed_layers
from yaongi.world import World


def expert_degree(run: Running, world: World) -> int:
    """Return over how many processes the experts of a layer are spread: as asked for, or those of a host.

    Raises:
        ValueError: a number is asked for, and another way of several processes.
    """
    if run.expert_parallel_degree and run.parallel not in ("auto", "experts"):
        raise ValueError(f"train: --expert-parallel-degree must go with --parallel experts, got {run.parallel}")
    here = PER_NODE if run.processes else min(world.gather(world.local_size))
    return run.expert_parallel_degree or min(here, run.processes or world.size)


def refusal(model: ModelConfig, processes: int, degree: int) -> str:
    """Return why a layer's experts can't be spread over `degree` of the processes; empty if they can."""
    if processes == 1:
        return "train: --parallel experts must have 2 processes or more, got 1"
    if "E" not in model.pattern:
        return f"train: --parallel experts must have a model with experts, got the layers {model.pattern}"
    if "experts" in model.precision.roles:
        return "train: --parallel experts must have experts in bf16, got fp8"
    if degree < 2 or model.experts % degree or processes % degree:
        wanted = f"2 or more and divide {model.experts} experts and {processes} processes"
        return f"train: --expert-parallel-degree must be {wanted}, got {degree}"
    return ""


def spread_cost(cost: StepCost, model: Yaongi, degree: int, micro_tokens: int, recompute: str) -> StepCost:
    """Return what a step takes where experts are spread, from what it takes where every GPU holds all.

    Args:
        model: with all experts.
        degree: GPUs over which they are spread; 1: they are not.
        micro_tokens: per micro-batch.
    """
    if degree == 1:
        return cost
    roles, element = parameter_roles(model), model.lm_head.weight.element_size()
    numbers = sum(p.numel() for name, p in model.named_parameters() if roles[name].kind == "expert")
    layers = model.config.layers_of("E")
    again = set(layers) & set(recomputed_layers(recompute, model.config.pattern))
    passes = 4 * len(layers) + 2 * len(again)  # to the experts and back, and so do gradients
    return replace(
        cost,
        zero_seconds=cost.zero_seconds * (1 - 4 * numbers * (1 - 1 / degree) / cost.gradient_bytes),
        gradient_bytes=cost.gradient_bytes - 4 * numbers,
        weight_bytes=cost.weight_bytes - element * numbers,
        degree=degree,
        dispatch_bytes=passes * (degree - 1) * micro_tokens * model.config.hidden_size * element,
        expert_bytes=(4 + element) * numbers / degree,
    )
