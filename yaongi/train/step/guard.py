"""Steps to skip, whose loss or gradient is not finite, and steps to point out, whose loss is a spike."""

import math
from collections import deque
from collections.abc import Iterable, Sequence

import torch

WINDOW = 128
SIGMAS = 6.0
_SPIKE_AFTER = 32  # losses needed before their standard deviation is reliable


class BadStepError(RuntimeError):
    """More bad steps in a row than the configuration allows."""


class Guard:
    """A counter of consecutive bad steps, and the losses of the last `WINDOW` good steps."""

    def __init__(self, allowed: int) -> None:
        """Start with empty counts.

        Args:
            allowed: how many bad steps in a row are skipped before the run stops.
        """
        self.allowed = allowed
        self.in_a_row = 0
        self.skipped = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Return whether `loss` is more than 6 σ above the window's mean, then add it to the window."""
        seen = len(self._losses)
        spike = False
        if seen >= _SPIKE_AFTER:
            mean = sum(self._losses) / seen
            deviation = math.sqrt(sum((value - mean) ** 2 for value in self._losses) / seen)
            spike = loss > mean + SIGMAS * deviation
        self._losses.append(loss)
        return spike

    def good(self) -> None:
        """Note a step that was applied."""
        self.in_a_row = 0

    def bad(self, step: int, what: str, samples: Sequence[int]) -> str:
        """Note a step that was not applied.

        Args:
            what: the bad tensor nearest to the loss.
            samples: row numbers of the batch in the training order.

        Returns:
            The warning to print.

        Raises:
            BadStepError: it is one more consecutive bad step than `allowed`.
        """
        self.in_a_row += 1
        self.skipped += 1
        message = f"step {step}: {what} is not finite; batch: samples {_ranges(samples)}; update skipped"
        if self.in_a_row > self.allowed:
            raise BadStepError(f"{message}; {self.in_a_row} bad steps in a row, {self.allowed} allowed")
        return f"{message} ({self.in_a_row} of {self.allowed} allowed in a row)"

    def state_dict(self) -> dict[str, object]:
        """Return the counters and the window as values that JSON can hold."""
        return {"in_a_row": self.in_a_row, "skipped": self.skipped, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take the counters and the window from `state`."""
        self.in_a_row, self.skipped = int(state["in_a_row"]), int(state["skipped"])  # type: ignore[call-overload]
        self._losses = deque(state["losses"], maxlen=WINDOW)  # type: ignore[call-overload]


@torch.no_grad()
def first_nonfinite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity; synchronises with the device once."""
    names: list[str] = []
    largest: list[torch.Tensor] = []
    for name, tensor in named:
        values = tensor.coalesce().values() if tensor.is_sparse else tensor
        if values.is_floating_point() and values.numel():
            names.append(name)
            largest.append(torch.linalg.vector_norm(values, torch.inf).double())
    if not names:
        return None
    good = torch.stack([value.to(largest[0].device) for value in largest]).isfinite().tolist()
    return next((name for name, finite in zip(names, good, strict=True) if not finite), None)


def _ranges(numbers: Sequence[int]) -> str:
    """Format 3, 4, 5, 6, 9 as `3-6, 9`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
