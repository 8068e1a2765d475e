"""The learning rate of every step: warm-up, then WSD (warm-up, stable, decay) or cosine."""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["wsd", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """A pure function of the step, so that nothing of it needs saving."""

    steps: int
    kind: Kind = "wsd"
    warmup: float = 0.01  # share of the steps
    decay: float = 0.2  # share of the steps, WSD only
    final: float = 1e-5  # learning rate of the last step

    def __post_init__(self) -> None:
        """ValueError for shares that don't fit into one another or into 0 to 1."""
        if self.steps < 1:
            raise ValueError(f"schedule: steps must be 1 or more, got {self.steps}")
        if self.kind not in ("wsd", "cosine"):
            raise ValueError(f"schedule: kind must be wsd or cosine, got {self.kind!r}")
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise ValueError(f"schedule: warmup + decay must be 0 to 1, got {self.warmup} + {self.decay}")
        if not self.final >= 0:
            raise ValueError(f"schedule: final_lr must be 0 or more, got {self.final}")

    @property
    def warmup_steps(self) -> int:
        """Steps of the linear rise; at least one if any was asked for."""
        return min(self.steps, math.ceil(self.steps * self.warmup))

    @property
    def decay_steps(self) -> int:
        """Steps of the descent: the last `decay` for WSD, all that follow the warm-up for cosine."""
        if self.kind == "cosine":
            return self.steps - self.warmup_steps
        return min(self.steps - self.warmup_steps, math.ceil(self.steps * self.decay))

    def phase(self, step: int) -> str:
        """`warmup`, `stable` or `decay`, for a step counted from 0."""
        if step < self.warmup_steps:
            return "warmup"
        return "decay" if step >= self.steps - self.decay_steps else "stable"

    def lr(self, step: int, peak: float) -> float:
        """The learning rate of `step`, counted from 0, whose highest value is `peak`."""
        phase = self.phase(step)
        if phase == "warmup":
            return peak * (step + 1) / self.warmup_steps
        if phase == "stable":
            return peak
        final = min(self.final, peak)
        done = (step + 1 - (self.steps - self.decay_steps)) / self.decay_steps
        falling = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return final + (peak - final) * falling
