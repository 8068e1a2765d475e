"""The training speed of this machine, estimated from the speed of a matrix product, and the kernels that it runs."""

import time

import torch

from yaongi.kernels import unavailable
from yaongi.model import ModelConfig, Yaongi
from yaongi.model.config import PRECISION_ROLES
from yaongi.train.config import Training
from yaongi.train.optimizer.partition import newton_schulz_flops
from yaongi.train.plan.scaling import StepCost
from yaongi.world import World

_SHARE_OF_PRODUCT = {"cuda": 0.5, "cpu": 0.35}  # FLOP/s of a training step over FLOP/s of a large matrix product
_PRODUCTS, _LONGEST = 10, 0.1  # of which the speed is the mean; seconds, of which a CPU takes more for one in bfloat16
_SHARE_OF_UPDATE = 0.96  # FLOP/s of Newton-Schulz steps over those of a training step
_MEMORY = {"cuda": 2.6e12, "cpu": 1e10}  # bytes per second to and from memory
_TRAFFIC = 22  # bytes that the update of a number reads and writes
_NVLINK = 150e9  # bytes per second that links within a host reach with NVLink
FP8_CAPABILITY = (8, 9)  # the first with FP8 tensor cores
_H100_SPEED = 0.5 * 7.3e14  # FLOP/s of a bfloat16 training step on an H100, by the same estimate


def step_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Run a large matrix product in `dtype`, and return from its speed the estimated FLOP/s of a training step."""
    size, products = 8192 if device.type == "cuda" else 512, 0
    a = torch.ones(size, size, dtype=dtype, device=device)
    a @ a
    _synchronize(device)
    began = time.perf_counter()
    while products < _PRODUCTS and time.perf_counter() - began < _LONGEST:
        a @ a
        products += 1
    _synchronize(device)
    return _SHARE_OF_PRODUCT[device.type] * products * 2 * size**3 / (time.perf_counter() - began)


def step_cost(model: Yaongi, train: Training, rows: int, flops: float, speed: float, device: torch.device) -> StepCost:
    """Return what a step takes on one device of this kind.

    Args:
        rows: per micro-batch.
        flops: per token.
        speed: estimated FLOP/s of a micro-batch.
    """
    numbers, element = sum(p.numel() for p in model.parameters()), model.lm_head.weight.element_size()
    update = newton_schulz_flops(model, train) / (_SHARE_OF_UPDATE * speed) + _TRAFFIC * numbers / _MEMORY[device.type]
    return StepCost(
        micro_batches=train.batch_rows // rows,
        micro_seconds=rows * train.row_tokens * flops / speed,
        update_seconds=update,
        zero_seconds=4 * numbers / _MEMORY[device.type],
        gradient_bytes=4 * numbers,
        weight_bytes=element * numbers,
    )


def link_speed(world: World, numbers: int = 1 << 26) -> float:
    """Return the bytes per second through each process's links, from all-reduces of so many float32 numbers."""
    tensor, repeats = torch.zeros(numbers, device=world.device), 5
    world.all_reduce(tensor)
    _synchronize(world.device)
    world.barrier()
    began = time.perf_counter()
    for _ in range(repeats):
        world.all_reduce(tensor)
    _synchronize(world.device)
    moved = repeats * 2 * (world.size - 1) / world.size * 4 * numbers
    return moved / (time.perf_counter() - began)


def links_here(speed: float, *, one_host: bool) -> str:
    """Return what to say about the links between GPUs.

    Args:
        speed: from `link_speed`.
    """
    slow = one_host and speed < _NVLINK
    return f"{speed / 1e9:.0f} GB/s between GPUs" + (": NVLink is not used (nvidia-smi topo -m)" if slow else "")


def kernels_here(device: torch.device, speed: float) -> str:
    """Return which kernels the ops run on here.

    Args:
        speed: estimated FLOP/s of a training step.
    """
    slower = f"about 1/{_H100_SPEED / speed:.0f} of an H100's speed"
    if device.type == "cpu":
        return f"plain torch, right and slow: {slower}; the fast ones want an NVIDIA GPU"
    reason = unavailable("cuda")
    return "CUDA and Triton" if reason is None else f"Triton and torch's products, {slower}: {reason}"


def fp8_here(model: ModelConfig, device: torch.device) -> str:
    """Return what runs in FP8 on a device of this machine; empty without FP8."""
    return fp8_layers(model, device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY)


def fp8_layers(model: ModelConfig, real: bool) -> str:
    """Return what runs in FP8, and whether it is `real` or only emulated; empty without FP8."""
    layers = model.precision.layers(model.pattern)
    if not layers:
        return ""
    here = {role for i in layers for role in PRECISION_ROLES[model.pattern[i]]}
    roles = ", ".join(role for role in model.precision.roles if role in here).replace("_", " ")
    how = "" if real else "; emulated here, slower than bf16"
    return f"fp8: {roles} in {len(layers)} of {len(model.pattern)} layers{how}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
