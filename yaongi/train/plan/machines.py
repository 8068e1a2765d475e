"""GPUs that a run can be planned for without having one, and what was measured on them."""

from dataclasses import dataclass, replace

import torch

from yaongi.train.config import Config, load_config
from yaongi.train.plan.scaling import COMMON_UPDATE, StepCost

_SHARE = 0.39  # FLOP/s of yaongi-4b's training step on an H100 over the GPU's published FLOP/s


@dataclass(frozen=True)
class Machine:
    """A kind of GPU."""

    name: str
    memory: int  # bytes, as torch reports them
    flops: float  # published dense bfloat16 FLOP/s
    kernels: str
    has_fp8: bool = True
    like_h100: bool = False  # whether the figures measured on an H100 hold for it

    @property
    def speed(self) -> float:
        """FLOP/s of a bfloat16 training step, guessed."""
        return _SHARE * self.flops


@dataclass(frozen=True)
class Measured:
    """What a preset took on one H100."""

    token_seconds: float  # of a micro-batch
    update_seconds: float
    page: str = "docs/results.md"  # where the figures stand


_TRITON = "Triton and torch's products, not measured"
_LIKE_H100 = ("H100 80GB HBM3", "H200")  # in a GPU's name; the PCIe card is slower
MACHINES = {
    "h100": Machine("H100 80 GB", 84_900_000_000, 989e12, "CUDA and Triton", like_h100=True),
    "h200": Machine("H200 141 GB", 150_000_000_000, 989e12, "CUDA and Triton", like_h100=True),
    "a100": Machine("A100 80 GB", 84_900_000_000, 312e12, _TRITON, has_fp8=False),
    "l40s": Machine("L40S 48 GB", 47_700_000_000, 362e12, _TRITON),
    "rtx4090": Machine("RTX 4090 24 GB", 25_300_000_000, 165e12, _TRITON),
}
H100 = {  # from the milliseconds of micro-batches of 2, 2, 1 and 32 rows, and of the optimizer
    "yaongi-4b": Measured(0.1599 / 8192, 0.1409),
    "yaongi-4b-fp8": Measured(0.1456 / 8192, 0.1644, "docs/LAB.md"),
    "yaongi-4b-pairs": Measured(0.1329 / 4096, 0.1561),
    "yaongi-small": Measured(0.09269 / 65536, 0.01943),
}


def like_h100(plan_for: str, device: torch.device) -> bool:
    """Return whether what was measured on an H100 holds for the GPU to plan for, or else for the device here."""
    machine = MACHINES.get(plan_for)
    if machine is not None:
        return machine.like_h100
    return device.type == "cuda" and any(name in torch.cuda.get_device_name(device) for name in _LIKE_H100)


def as_measured(cost: StepCost, basis: str, micro_tokens: int, config: Config) -> tuple[StepCost, str]:
    """Return what a step takes on a GPU like an H100, measured where the preset was, and what it follows from.

    Args:
        cost: what the step takes by a guessed speed.
        basis: what that follows from.
        micro_tokens: per micro-batch.
    """
    found = H100.get(config.preset)
    preset = load_config(config.preset) if found else None
    same = preset is not None and (preset.model, preset.train.row_tokens) == (config.model, config.train.row_tokens)
    if found is None or not same or config.run.recompute != "none":
        return cost, basis
    update = max(0.0, found.update_seconds - cost.zero_seconds - COMMON_UPDATE)
    seconds = micro_tokens * found.token_seconds
    return replace(cost, micro_seconds=seconds, update_seconds=update), f"measured on an H100 ({found.page})"
