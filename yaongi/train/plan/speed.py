"""The training speed of this machine, estimated from the speed of a matrix product, and the kernels that it runs."""

import time

import torch

from yaongi.kernels import unavailable
from yaongi.model import ModelConfig
from yaongi.model.config import PRECISION_ROLES

_SHARE_OF_PRODUCT = {"cuda": 0.5, "cpu": 0.35}  # FLOP/s of a training step over FLOP/s of a large matrix product
FP8_CAPABILITY = (8, 9)  # the first with FP8 tensor cores
_H100_SPEED = 0.5 * 7.3e14  # FLOP/s of a bfloat16 training step on an H100, by the same estimate


def step_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Run a large matrix product in `dtype`, and return from its speed the estimated FLOP/s of a training step."""
    size, repeats = (8192, 10) if device.type == "cuda" else (512, 10)
    a = torch.ones(size, size, dtype=dtype, device=device)
    a @ a
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        a @ a
    _synchronize(device)
    return _SHARE_OF_PRODUCT[device.type] * repeats * 2 * size**3 / (time.perf_counter() - began)


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
    """Return what runs in FP8 and where it is only emulated; empty without FP8."""
    layers = model.precision.layers(model.pattern)
    if not layers:
        return ""
    kinds = {PRECISION_ROLES[model.pattern[i]] for i in layers}
    roles = ", ".join(role for role in model.precision.roles if role in kinds).replace("_", " ")
    real = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    how = "" if real else "; emulated here, slower than bf16"
    return f"fp8: {roles} in {len(layers)} of {len(model.pattern)} layers{how}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
