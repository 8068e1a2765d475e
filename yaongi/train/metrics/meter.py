"""Speed, memory and time of the steps, and the expert load."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from yaongi.train.plan.memory import resident_bytes
from yaongi.train.plan.run_plan import Plan
from yaongi.train.step.stepper import StepResult

_H100_FLOPS = 989e12  # peak, dense bfloat16
_HOPPER = (9, 0)


class Meter:
    """A stopwatch for steps: a step lasts from one `measure` to the next, without the time within `paused`."""

    def __init__(self, plan: Plan, device: torch.device, seconds: float) -> None:
        """Start the first step.

        Args:
            seconds: duration of the run's earlier sessions, 0 for a new run.
        """
        self._plan, self._device = plan, device
        self._before, self._began = seconds, time.perf_counter()
        self._mark = self._began
        self._waited = self._idle = 0.0
        self._steps = self._seconds = self._data = 0.0  # since the last summary

    @property
    def seconds(self) -> float:
        """Duration of the run so far, over all its sessions."""
        return self._before + time.perf_counter() - self._began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the wait for data within the block."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Don't count the time within the block as training: for evaluations and saves."""
        began = time.perf_counter()
        yield
        self._idle += time.perf_counter() - began

    def measure(self, step: int, result: StepResult) -> dict[str, Any]:
        """End a step and return the values for its record."""
        elapsed = self._lap()
        self._steps += 1
        self._seconds += elapsed
        values: dict[str, Any] = {
            "loss": result.loss,
            "z": result.z,
            "balance": result.balance,
            "gnorm": result.gnorm,
            "tokens": step * self._plan.batch_rows * self._plan.row_tokens,
            "hours": self.seconds / 3600,
            "step_seconds": elapsed,
            **self._speed(elapsed),
            "memory": self._memory(),
        }
        values |= result.more
        if result.text_bytes:
            values["bpb"] = result.loss * result.targets / result.text_bytes / math.log(2)
            values["target_share"] = result.targets / (self._plan.batch_rows * self._plan.row_tokens)
        if any(result.rank_seconds):
            values["rank_seconds"] = list(result.rank_seconds)
        if result.fp8_saturated is not None:
            values |= {"fp8_saturated": result.fp8_saturated, "fp8_reach": result.fp8_reach}
        if self._is_hopper():
            values["mfu"] = values["tflops"] * 1e12 / _H100_FLOPS / self._plan.processes
        return values

    def summary(self, loads: torch.Tensor, left: int) -> dict[str, Any]:
        """Return means since the last summary, the estimated time to the end, and the last step's expert load.

        Args:
            loads: (MoE layers, E), tokens that each expert got in the last step.
            left: steps left to the end of the run.
        """
        per_step = self._seconds / self._steps
        values: dict[str, Any] = {
            **self._speed(per_step),
            "data_wait": self._data / self._seconds,
            "eta": per_step * left,
        }
        if loads.numel():
            counts = loads.double()
            values["loads"] = loads.tolist()
            values["experts_cv"] = float((counts.std(1, correction=0) / counts.mean(1)).mean())
            values["experts_dead"] = int((loads == 0).sum())
        self._steps = self._seconds = self._data = 0.0
        return values

    def skip(self) -> None:
        """End a step that was not applied."""
        self._lap()

    def _speed(self, seconds: float) -> dict[str, float]:
        """Return the speed of a step that takes `seconds`."""
        speed = self._plan.batch_rows * self._plan.row_tokens / seconds
        return {"tokens_per_second": speed, "tflops": speed * self._plan.flops_per_token / 1e12}

    def _lap(self) -> float:
        now = time.perf_counter()
        elapsed = now - self._mark - self._idle
        self._data += self._waited
        self._mark, self._waited, self._idle = now, 0.0, 0.0
        return elapsed

    def _memory(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else resident_bytes()

    def _is_hopper(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.get_device_capability(self._device) == _HOPPER
