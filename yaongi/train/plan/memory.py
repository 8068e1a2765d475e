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
from yaongi.train.distributed.ownership import Ownership
from yaongi.train.optimizer.partition import divide_parameters
from yaongi.train.optimizer.roles import parameter_roles
from yaongi.train.plan.activations import activation_bytes
from yaongi.train.plan.machines import Machine
from yaongi.train.recompute import recomputed_layers

_USABLE = 0.93  # share of a device's memory that a run may plan with; the rest is left for fragmentation
# Measured factors on the activations: the count misses the temporary tensors inside an op's reference implementation.
_REFERENCES = {"cpu": 1.6, "cuda": 1.4}
_GPU_BASE = 100_000_000  # workspaces of cuBLAS and of the kernels, as the allocator counts them
_NCCL = 1_100_000_000  # buffers of NCCL on each of several GPUs, which the allocator doesn't count (docs/LAB.md)
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

    def __init__(
        self,
        model: Yaongi,
        config: Config,
        device: torch.device,
        processes: int = 1,
        machine: Machine | None = None,
    ) -> None:
        """Prepare a forecast for a device of this machine, or for one of another `machine`."""
        self._model, self._config, self._device, self._processes = model, config, device, processes
        self._has_kernels = _has_kernel("mamba_scan") if machine is None else True
        self._usable = _USABLE * (memory_of(device) if machine is None else machine.memory)
        self.ownership = divide_parameters(model, config.train, processes)
        self._state = self._state_bytes(processes, self.ownership)
        self.parallel = self._choose(config.run.parallel)

    def _choose(self, asked: str) -> str:
        """Return the way of several processes: for auto replicated weights if one row fits with them, else FSDP."""
        if self._processes == 1 or asked == "replicate":
            return "replicate"
        if asked == "auto" and (self._device.type == "cpu" or self.fits(1)):
            return "replicate"
        self._state = self._state_bytes(self._processes, None)
        return "fsdp"

    @property
    def checkpoint_bytes(self) -> int:
        """The bytes of a checkpoint: master copies, or weights that have none, momentum and moments."""
        state = self._state_bytes(1, Ownership())
        return (state["masters"] or state["weights"]) + state["momentum"] + state["moments"]

    def __call__(self, rows: int, recompute: str | None = None) -> Memory:
        """Return the memory with micro-batches of `rows` rows and a recompute policy (None: the configured one)."""
        policy = self._config.run.recompute if recompute is None else recompute
        self._model.recompute = recomputed_layers(policy, self._config.model.pattern)
        activations = activation_bytes(self._model, rows, self._config.train.row_tokens, self._device)
        if self._device.type == "cpu" or not self._has_kernels:
            activations = round(_REFERENCES[self._device.type] * activations)
        several = _NCCL if self._processes > 1 else 0
        base = _GPU_BASE + several if self._device.type == "cuda" else resident_bytes()
        return Memory(**self._state, activations=activations, base=base)

    def _state_bytes(self, processes: int, ownership: Ownership | None) -> dict[str, int]:
        """Return the bytes of everything that the fullest process keeps from step to step, by part.

        Args:
            ownership: of replicated weights; None: everything is sharded evenly.
        """
        train, model, size = self._config.train, self._model, processes
        roles = parameter_roles(model)
        momentum = train.matrix_momentum_dtype(self._device) if train.matrix_optimizer == "teon" else None
        fp8 = {id(weight) for weight in model.fp8_weights()}
        sizes = dict.fromkeys(("weights", "masters", "gradients", "momentum", "moments"), 0.0)
        for name, parameter in model.named_parameters():
            kind, count = roles[name].kind, parameter.numel()
            here = count / size if ownership is None else count
            # An owner of whole matrices has a few percent more than its share.
            own = here if ownership is None or name not in ownership else count / ownership.size
            sharded = ownership is None and size > 1
            width = max(4, parameter.element_size()) if sharded else parameter.element_size()  # FSDP's are the masters
            sizes["weights"] += here * (width + (2 if id(parameter) in fp8 else 0))  # two casts
            sizes["masters"] += 4 * own if parameter.element_size() < 4 and not sharded else 0
            if kind != "table" or not sharded:  # FSDP's tables have sparse gradients
                sizes["gradients"] += 4 * here
            if kind in ("table", "adamw") or momentum is None:
                sizes["moments"] += 8 * own
            else:
                sizes["momentum"] += momentum.itemsize * own
        return {part: round(total) for part, total in sizes.items()}

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


def _has_kernel(op: str) -> bool:
    """Return whether this machine has a kernel for an op, not only its reference implementation."""
    return any(a.op == op and a.backend != "reference" and a.reason is None for a in info())
