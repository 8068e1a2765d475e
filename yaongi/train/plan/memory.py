"""How much memory a run will need, by part, computed before it starts.

Weights, masters, gradients and moments follow from the parameters; activations from a trial of one micro-batch on the
meta device (activations.py).
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
from yaongi.train.distributed.world import World
from yaongi.train.optimizer.roles import parameter_roles
from yaongi.train.plan.activations import activation_bytes
from yaongi.train.recompute import recomputed_layers

_USABLE = 0.93  # of a GPU's memory; the rest is left to fragmentation
_REFERENCES = {"cpu": 1.6, "cuda": 1.4}  # measured: what an op's reference holds while it runs isn't seen from outside
_GPU_BASE = 100_000_000  # workspaces of cuBLAS and of the kernels, as the allocator counts them
_CPU_TOKENS = 1 << 12  # of a forward pass on a CPU, where more is not faster


@dataclass(frozen=True)
class Memory:
    """Bytes of a process at its fullest."""

    weights: int
    masters: int
    gradients: int
    momentum: int
    moments: int  # of AdamW and of the tables
    activations: int  # what a forward and backward pass adds at its peak
    base: int  # the program itself

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


class MemoryForecast:
    """Predicts the memory of training a model, which lies on the meta device."""

    def __init__(self, model: Yaongi, config: Config, world: World) -> None:
        self._model, self._config, self._device = model, config, world.device
        self._state = _state_bytes(model, config, world)
        self._usable = _USABLE * memory_of(world.device)

    def __call__(self, rows: int, recompute: str | None = None) -> Memory:
        """With micro-batches of `rows`, layers recomputed by a policy, else as configured."""
        policy = self._config.run.recompute if recompute is None else recompute
        self._model.recompute = recomputed_layers(policy, self._config.model.pattern)
        activations = activation_bytes(self._model, rows, self._config.train.row_tokens, self._device)
        if self._device.type == "cpu" or not _has_kernel("mamba_scan"):
            activations = round(_REFERENCES[self._device.type] * activations)
        base = _GPU_BASE if self._device.type == "cuda" else resident_bytes()
        return Memory(**self._state, activations=activations, base=base)

    def fits(self, rows: int, recompute: str | None = None) -> bool:
        """Whether that is there."""
        return self(rows, recompute).total <= self._usable

    def rows_that_fit(self) -> int:
        """The largest micro-batch, but on a CPU no more than helps; at least 1."""
        if self._device.type == "cpu":
            return max(1, _CPU_TOKENS // self._config.train.row_tokens)
        one, two = self(1).total, self(2).total
        return max(1, 1 + int((self._usable - one) // max(1, two - one)))


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a GPU has, or for a CPU the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """The most memory this process has had so far, as the system counts it.

    On Linux from the process's own status: `getrusage` also counts what its parent had when it was forked.
    """
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _state_bytes(model: Yaongi, config: Config, world: World) -> dict[str, int]:
    """Bytes of all that lasts from step to step, by part."""
    train, roles = config.train, parameter_roles(model)
    momentum = train.matrix_momentum_dtype(world.device) if train.matrix_optimizer == "teon" else None
    sizes = {"weights": 0, "masters": 0, "gradients": 0, "momentum": 0, "moments": 0}
    for name, parameter in model.named_parameters():
        role, count = roles[name], parameter.numel() // world.size
        sizes["weights"] += count * parameter.element_size()
        sizes["masters"] += 4 * count if parameter.element_size() < 4 else 0
        if role.kind != "table" or world.size == 1:  # a sharded run's tables have sparse gradients
            sizes["gradients"] += 4 * count
        if role.kind in ("table", "adamw") or momentum is None:
            sizes["moments"] += 8 * count
        else:
            sizes["momentum"] += momentum.itemsize * count
    return sizes


def _has_kernel(op: str) -> bool:
    """Whether this machine runs an op by more than its reference."""
    return any(a.op == op and a.backend != "reference" and a.reason is None for a in info())
