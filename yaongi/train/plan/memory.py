"""The memory that a run will need, by part, computed before it starts.

Weights, master copies, gradients, momentum and moments follow from the parameters' shapes; activations from one
micro-batch run on the meta device (activations.py).
"""

import os
import resource
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from yaongi.kernels import info
from yaongi.model import Yaongi
from yaongi.train.config import Config
from yaongi.train.optimizer.roles import parameter_roles
from yaongi.train.plan.activations import activation_bytes
from yaongi.train.recompute import recomputed_layers
from yaongi.world import World

_USABLE = 0.93  # share of a device's memory that a run may plan with; the rest is left for fragmentation
# Measured factors on the activations: the count misses the temporary tensors inside an op's reference implementation.
_REFERENCES = {"cpu": 1.6, "cuda": 1.4}
_GPU_BASE = 100_000_000  # workspaces of cuBLAS and of the kernels, as the allocator counts them
_CPU_TOKENS = 1 << 12  # tokens per micro-batch on a CPU, where more is not faster


@dataclass(frozen=True)
class Memory:
    """Peak memory of a process, in bytes."""

    weights: int
    masters: int  # float32 master copies of the weights
    gradients: int
    momentum: int  # momentum buffers of the matrices
    moments: int  # moments of all parameters that AdamW or Adam updates
    activations: int  # what a forward and backward pass adds at its peak
    base: int  # the program itself

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


class MemoryForecast:
    """A forecast of the memory that training takes, for a model on the meta device."""

    def __init__(self, model: Yaongi, config: Config, world: World) -> None:
        self._model, self._config, self._device = model, config, world.device
        self._state = _state_bytes(model, config, world)
        self._usable = _USABLE * memory_of(world.device)

    def __call__(self, rows: int, recompute: str | None = None) -> Memory:
        """Return the memory with micro-batches of `rows` rows and a recompute policy (None: the configured one)."""
        policy = self._config.run.recompute if recompute is None else recompute
        self._model.recompute = recomputed_layers(policy, self._config.model.pattern)
        activations = activation_bytes(self._model, rows, self._config.train.row_tokens, self._device)
        if self._device.type == "cpu" or not _has_kernel("mamba_scan"):
            activations = round(_REFERENCES[self._device.type] * activations)
        base = _GPU_BASE if self._device.type == "cuda" else resident_bytes()
        return Memory(**self._state, activations=activations, base=base)

    def fits(self, rows: int, recompute: str | None = None) -> bool:
        """Return whether the memory with these settings fits into the device."""
        return self(rows, recompute).total <= self._usable

    def rows_that_fit(self) -> int:
        """Return the rows of the largest micro-batch that fits, on a CPU of the largest that helps; at least 1."""
        if self._device.type == "cpu":
            return max(1, _CPU_TOKENS // self._config.train.row_tokens)
        one, two = self(1).total, self(2).total
        return max(1, 1 + int((self._usable - one) // max(1, two - one)))


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """Return this process's peak memory so far, as the system counts it, in bytes.

    On Linux read `/proc/self/status`: `getrusage` includes the memory that the parent had at the fork.
    """
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _state_bytes(model: Yaongi, config: Config, world: World) -> dict[str, int]:
    """Return the bytes of everything that is kept from step to step, by part."""
    train, roles = config.train, parameter_roles(model)
    momentum = train.matrix_momentum_dtype(world.device) if train.matrix_optimizer == "teon" else None
    sizes = {"weights": 0, "masters": 0, "gradients": 0, "momentum": 0, "moments": 0}
    fp8 = {id(weight) for weight in model.fp8_weights()}
    for name, parameter in model.named_parameters():
        role, count = roles[name], parameter.numel() // world.size
        sizes["weights"] += count * (parameter.element_size() + (2 if id(parameter) in fp8 else 0))  # two casts
        sizes["masters"] += 4 * count if parameter.element_size() < 4 else 0
        if role.kind != "table" or world.size == 1:  # with several processes the tables' gradients are sparse
            sizes["gradients"] += 4 * count
        if role.kind in ("table", "adamw") or momentum is None:
            sizes["moments"] += 8 * count
        else:
            sizes["momentum"] += momentum.itemsize * count
    return sizes


def _has_kernel(op: str) -> bool:
    """Return whether this machine has a kernel for an op, not only its reference implementation."""
    return any(a.op == op and a.backend != "reference" and a.reason is None for a in info())
