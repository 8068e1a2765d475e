"""The rates of every step: the learning rate by WSD (warm-up, stable, decay) or cosine, and the router bias's."""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["wsd", "cosine"]
MOST_BIAS_RATE = 0.03  # with larger steps a router's choices would jump to and fro: scores lie within 0 to 1


def bias_rate(step: int, steps: int, travel: float) -> float:
    """Return the step size of the router's balancing bias at `step`, counted from 0.

    It falls linearly to almost 0 at the run's end. Over all steps it adds up to `travel`, in units of the router's
    scores, or to less in a run so short that `MOST_BIAS_RATE` limits it.
    """
    return min(MOST_BIAS_RATE, 2 * travel * (steps - step) / (steps * (steps + 1)))


def is_due(every: int, step: int, steps: int) -> bool:
    """Return whether something that happens every `every` steps, and after the last of `steps`, is due at `step`."""
    return step == steps or (every > 0 and step % every == 0)


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
