"""The memory that a run will need, by part, computed before it starts.

Weights, master copies, gradients, momentum and moments follow from the parameters' shapes; activations from one
micro-batch run on the meta device (activations.py).
"""

import copy
import os
import resource
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from yaongi.kernels import info
from yaongi.model import Yaongi
from yaongi.train.build import matrix_momentum_dtype
from yaongi.train.config import Config
from yaongi.train.distributed.experts import spread_experts
from yaongi.train.distributed.ownership import Ownership
from yaongi.train.optimizer.partition import divide_experts, divide_parameters
from yaongi.train.optimizer.roles import parameter_roles
from yaongi.train.plan.activations import activation_bytes
from yaongi.train.plan.machines import Machine
from yaongi.train.plan.scaling import PER_NODE
from yaongi.train.plan.spreading import refusal
from yaongi.train.recompute import recomputed_layers

_USABLE = 0.93  # share of a device's memory that a run may plan with; the rest is left for fragmentation
# Measured factors on the activations: the count misses the temporary tensors inside an op's reference implementation.
_REFERENCES = {"cpu": 1.6, "cuda": 1.4}
_GPU_BASE = 100_000_000  # workspaces of cuBLAS and of the kernels, as the allocator counts them
_NCCL = 1_100_000_000  # buffers of NCCL on each of several GPUs, which the allocator doesn't count (docs/LAB.md)
_GATHERED_LAYERS = 5  # of the largest: two gathered, a gradient, and it again in float32; reckoned, not measured
_MOST_GPUS = 1024  # that are planned
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
    gathered: int = 0  # the layers that FSDP holds whole at once, and their gradients

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
        degree: int = 1,
    ) -> None:
        """Prepare a forecast for a device of this machine, or for one of another `machine`.

        Args:
            degree: processes over which a layer's experts are spread, if they are.

        Raises:
            ValueError: experts are to be spread, and can't be.
        """
        self._whole = self._model = model
        self._counted: dict[tuple[bool, bool, int, str], int] = {}  # activations
        self._in_place = device.type == "cuda"  # whether gradients are added up where they lie
        self._config, self._device, self._processes, self._machine = config, device, processes, machine
        self._has_kernels = _has_kernel("mamba_scan") if machine is None else True
        self._usable = _USABLE * (memory_of(device) if machine is None else machine.memory)
        self.ownership = divide_parameters(model, config.train, processes)
        self._state = self._state_bytes(model, processes, self.ownership)
        self.parallel = self._choose(config.run.parallel, degree)
        self.degree = degree if self.parallel == "experts" else 1

    def _choose(self, asked: str, degree: int) -> str:
        """Return the way of several processes: for auto the first of three with which one row fits, or the last."""
        refused = refusal(self._config.model, self._processes, degree)
        if asked == "experts" and refused:
            raise ValueError(refused)
        if self._processes == 1 or asked == "replicate":
            return "replicate"
        if asked == "auto" and (self._device.type == "cpu" or self.fits(1)):
            return "replicate"
        if asked == "experts" or (asked == "auto" and not refused):
            self._spread(degree)
            if asked == "experts" or self.fits(1):
                return "experts"
            self._model = self._whole
        self._state, self._in_place = self._state_bytes(self._whole, self._processes), False
        self._state["gathered"] = _GATHERED_LAYERS * self._largest_layer()
        return "fsdp"

    def _largest_layer(self) -> int:
        """Return the bytes of the weights of the largest layer, without tables."""
        roles = parameter_roles(self._whole)
        sizes = Counter[str]()
        for name, parameter in self._whole.backbone.layers.named_parameters(prefix="backbone.layers"):
            if roles[name].kind != "table":
                sizes[name.split(".")[2]] += parameter.numel() * parameter.element_size()
        return max(sizes.values())

    def _spread(self, degree: int) -> None:
        """Forecast from now on for experts that are spread."""
        self._model = copy.deepcopy(self._whole)
        spread_experts(self._model, degree, 0, None)
        train = self._config.train
        self.ownership = divide_parameters(self._whole, train, self._processes, experts_apart=True)
        experts = divide_experts(self._whole, self._processes, degree)
        self._state = self._state_bytes(self._model, self._processes, self.ownership, experts)

    @property
    def checkpoint_bytes(self) -> int:
        """The bytes of a checkpoint: weights in float32 or wider, momentum and moments."""
        state = self._state_bytes(self._whole, 1, Ownership())
        weights = sum(max(4, p.element_size()) * p.numel() for p in self._whole.parameters())
        return weights + state["momentum"] + state["moments"]

    def __call__(self, rows: int, recompute: str | None = None) -> Memory:
        """Return the memory with micro-batches of `rows` rows and a recompute policy (None: the configured one)."""
        policy = self._config.run.recompute if recompute is None else recompute
        self._model.recompute = recomputed_layers(policy, self._config.model.pattern)
        run = self._model is self._whole, self._in_place, rows, policy
        if run not in self._counted:  # which takes a second or two
            length = self._config.train.row_tokens
            self._counted[run] = activation_bytes(self._model, rows, length, self._device, in_place=self._in_place)
        activations = self._counted[run]
        if self._device.type == "cpu" or not self._has_kernels:
            activations = round(_REFERENCES[self._device.type] * activations)
        several = _NCCL if self._processes > 1 else 0
        base = _GPU_BASE + several if self._device.type == "cuda" else resident_bytes()
        return Memory(**self._state, activations=activations, base=base)

    def _state_bytes(self, model: Yaongi, processes: int, *ownerships: Ownership) -> dict[str, int]:
        """Return the bytes of everything that the fullest process keeps from step to step, by part.

        Args:
            model: what it holds of the model.
            ownerships: of different parameters; none: everything is sharded evenly.
        """
        train, sharded = self._config.train, processes > 1 and not ownerships
        roles = parameter_roles(model)
        momentum = matrix_momentum_dtype(train, self._device) if train.matrix_optimizer == "teon" else None
        fp8 = {id(weight) for weight in model.fp8_weights()}
        sizes = dict.fromkeys(("weights", "masters", "gradients", "momentum", "moments"), 0.0)
        for name, parameter in model.named_parameters():
            kind, count = roles[name].kind, parameter.numel()
            split = sharded and kind != "table"  # FSDP leaves tables whole
            here = count / processes if split else count
            # An owner of whole matrices has a few percent more than its share.
            own = here / next((ownership.size for ownership in ownerships if name in ownership), 1)
            width = max(4, parameter.element_size()) if split else parameter.element_size()  # FSDP's are the masters
            sizes["weights"] += here * (width + (2 if id(parameter) in fp8 else 0))  # two casts
            sizes["masters"] += 4 * own if parameter.element_size() < 4 and not split else 0
            if split or not sharded:  # FSDP's tables have sparse gradients
                sizes["gradients"] += 4 * here
            if kind in ("table", "adamw") or momentum is None:
                sizes["moments"] += 8 * own
            else:
                sizes["momentum"] += momentum.itemsize * own
        return {part: round(total) for part, total in sizes.items()}

    def fits(self, rows: int, recompute: str | None = None) -> bool:
        """Return whether the memory with these settings fits into the device."""
        return sum(self._state.values()) <= self._usable and self(rows, recompute).total <= self._usable

    def enough(self) -> int:
        """Return the least power of two of GPUs, up to `_MOST_GPUS`, with which a row fits; 0 if none is known.

        FP8 and sharded weights don't go together.
        """
        if self._device.type == "cpu" or self._config.run.parallel == "experts":
            return 0
        for processes in (2**n for n in range(_MOST_GPUS.bit_length())):
            given = self._whole, self._config, self._device, processes, self._machine, min(processes, PER_NODE)
            if processes > self._processes and (more := MemoryForecast(*given)).fits(1):
                return 0 if more.parallel == "fsdp" and self._config.model.precision.roles else processes
        return 0

    def rows_that_fit(self) -> int:
        """Return the rows of the largest micro-batch that fits, on a CPU of the largest that helps; at least 1."""
        if self._device.type == "cpu":
            return max(1, _CPU_TOKENS // self._config.train.row_tokens)
        one, two = self(1).total, self(2).total
        rows = max(1, 1 + int((self._usable - one) // max(1, two - one)))
        if rows > 2 and (most := self(rows).total) > self._usable:  # the peak lies elsewhere, and grows faster
            rows = 1 + int((self._usable - one) * (rows - 1) // (most - one))
        return rows


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
