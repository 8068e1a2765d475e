"""The learning rate of every step: WSD (warm-up, stable, decay), or warm-up and cosine."""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["wsd", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the step, so checkpoints need no scheduler state."""

    steps: int
    kind: Kind = "wsd"
    warmup: float = 0.01  # share of the steps
    decay: float = 0.2  # share of the steps, WSD only
    final: float = 1e-5  # learning rate of the last step

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError, for instance when `warmup + decay` is not within 0 to 1."""
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
        """Steps of the linear warm-up; at least one if `warmup` is above 0."""
        return min(self.steps, math.ceil(self.steps * self.warmup))

    @property
    def decay_steps(self) -> int:
        """Steps of the decay: the last share `decay` for WSD, all steps after the warm-up for cosine."""
        if self.kind == "cosine":
            return self.steps - self.warmup_steps
        return min(self.steps - self.warmup_steps, math.ceil(self.steps * self.decay))

    def phase(self, step: int) -> str:
        """Return "warmup", "stable" or "decay", for a step counted from 0."""
        if step < self.warmup_steps:
            return "warmup"
        return "decay" if step >= self.steps - self.decay_steps else "stable"

    def lr(self, step: int, peak: float) -> float:
        """Return the learning rate of `step`, counted from 0, for a schedule whose highest value is `peak`."""
        phase = self.phase(step)
        if phase == "warmup":
            return peak * (step + 1) / self.warmup_steps
        if phase == "stable":
            return peak
        final = min(self.final, peak)
        done = (step + 1 - (self.steps - self.decay_steps)) / self.decay_steps
        falling = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return final + (peak - final) * falling
