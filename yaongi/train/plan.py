"""What a run will be, said before it starts: size, steps, FLOPs, memory and whether it fits, time and cost."""

import math
import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from yaongi.data.tokenizer import Tokenizer
from yaongi.kernels.backend import unavailable
from yaongi.model import Yaongi
from yaongi.model.count import count_parameters, flops_per_token
from yaongi.train.build import build_model, micro_rows, momentum_dtype, weight_dtype
from yaongi.train.config import Config
from yaongi.train.distributed import World
from yaongi.train.log import duration, short, significant
from yaongi.train.memory import Memory, predict
from yaongi.train.recompute import CHEAPEST, MOST, recomputed_layers

_USABLE = 0.93  # of a GPU's memory; the rest is left to fragmentation
_SHARE_OF_PRODUCT = {"cuda": 0.5, "cpu": 0.35}  # a training step's FLOP/s over those of a large matrix product
_H100_SPEED = 0.5 * 7.3e14  # of a training step in bfloat16, FLOP/s, by the same measure
_CPU_TOKENS = 1 << 12  # of a forward pass on a CPU, where more is not faster


@dataclass(frozen=True)
class Plan:
    """The figures of a run."""

    preset: str
    device: str
    parameters: int
    active: int
    tokens: int
    steps: int
    batch_rows: int
    micro_rows: int
    row_tokens: int
    processes: int
    flops_per_token: float
    memory: Memory
    available: int  # bytes
    seconds: float
    dollars: float
    advice: str  # empty if it fits
    kernels: str  # what runs here, and where it isn't an H100, how slow that is

    @property
    def fits(self) -> bool:
        """Whether the memory will do."""
        return not self.advice

    def record(self) -> dict[str, Any]:
        """For ``metrics.jsonl``."""
        names = (
            "preset",
            "device",
            "parameters",
            "active",
            "tokens",
            "steps",
            "micro_rows",
            "processes",
            "flops_per_token",
        )
        return {name: getattr(self, name) for name in names} | {"predicted_memory": self.memory.total}

    def lines(self) -> str:
        """For people."""
        accumulation = self.batch_rows // self.micro_rows // self.processes
        parts = [(n, getattr(self.memory, n)) for n in self.memory.__dataclass_fields__]
        by_part = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts if size)
        flops = self.flops_per_token * self.tokens
        verdict = "fits" if self.fits else f"does not fit: {self.advice}"
        rows = [
            ("model", f"{self.preset}, {self.parameters:,} parameters, {self.active:,} active"),
            ("device", f"{self.device}, {self.processes} process{'es' if self.processes > 1 else ''}"),
            ("tokens", f"{self.tokens:,} in {self.steps:,} steps of {self.batch_rows} x {self.row_tokens}"),
            ("micro-batch", f"{self.micro_rows} x {self.row_tokens}, {accumulation} a step and process"),
            ("kernels", self.kernels),
            ("FLOPs", f"{flops:.2e}, {self.flops_per_token / 1e9:.3g} GFLOP a token"),
            ("memory", f"{_gigabytes(self.memory.total)} of {_gigabytes(self.available)}: {verdict}"),
            ("", by_part),
            ("time", f"about {duration(self.seconds)}, guessed from the speed of a matrix product"),
        ]
        if self.dollars:
            rows.append(("cost", f"about ${self.dollars:,.2f}"))
        return "\n".join(f"{name:<12} {text}" for name, text in rows)


def make_plan(config: Config, tokenizer: Tokenizer, world: World) -> Plan:
    """Work out the figures; takes a second or two.

    Raises:
        ValueError: the global batch can't be divided among processes and micro-batches.
    """
    train, device = config.train, world.device
    trial = _Trial(config, tokenizer, world)
    available = _available(device)
    rows = micro_rows(config, world, trial.rows_that_fit(available))
    memory = trial.memory(rows)
    counts = count_parameters(config.model)
    flops = flops_per_token(config.model, train.row_tokens)
    tokens = train.steps * train.batch_tokens
    speed = _SHARE_OF_PRODUCT[device.type] * _product_speed(config, device)
    seconds = flops * tokens / (speed * world.size)
    return Plan(
        preset=config.preset,
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        parameters=counts.total,
        active=counts.active,
        tokens=tokens,
        steps=train.steps,
        batch_rows=train.batch_rows,
        micro_rows=rows,
        row_tokens=train.row_tokens,
        processes=world.size,
        flops_per_token=flops,
        memory=memory,
        available=available,
        seconds=seconds,
        dollars=seconds / 3600 * config.run.dollars_per_hour,
        advice=trial.advice(rows, available),
        kernels=_kernels(device, speed),
    )


class _Trial:
    """Predicts memory with the model on the meta device."""

    def __init__(self, config: Config, tokenizer: Tokenizer, world: World) -> None:
        self._config, self._world = config, world
        self._model: Yaongi = build_model(config, tokenizer, "meta", dtype=weight_dtype(config.train, world.device))

    def memory(self, rows: int, policy: str = "") -> Memory:
        """With micro-batches of ``rows``, layers recomputed by ``policy``, else as configured."""
        train, device = self._config.train, self._world.device
        self._model.recompute = recomputed_layers(policy or self._config.run.recompute, self._config.model.pattern)
        momentum = momentum_dtype(train, device) if train.matrix_optimizer == "teon" else None
        return predict(self._model, rows, train.row_tokens, momentum=momentum, device=device, shards=self._world.size)

    def rows_that_fit(self, available: int) -> int:
        """The largest micro-batch for ``available`` bytes, but on a CPU no more than helps; at least 1."""
        if self._world.device.type == "cpu":
            return max(1, _CPU_TOKENS // self._config.train.row_tokens)
        one, two = self.memory(1).total, self.memory(2).total
        return max(1, 1 + math.floor((available * _USABLE - one) / max(1, two - one)))

    def advice(self, rows: int, available: int) -> str:
        """What to try when ``rows`` don't fit; empty if they do."""
        limit = available * _USABLE
        if self.memory(rows).total <= limit:
            return ""
        if rows > 1 and self.memory(1).total <= limit:
            return f"try --micro-rows {min(rows - 1, self.rows_that_fit(available))}"
        for policy in (CHEAPEST, MOST):
            if self.memory(1, policy).total <= limit:
                return f"try --micro-rows 1 --recompute {policy}"
        return "try more GPUs (torchrun), shorter rows (--row-tokens) or a smaller preset"


def _kernels(device: torch.device, speed: float) -> str:
    """What the ops run on; ``speed`` is that of a training step, FLOP/s."""
    slower = f"about 1/{_H100_SPEED / speed:.0f} of an H100's speed"
    if device.type == "cpu":
        return f"plain torch, right and slow: {slower}; the fast ones want an NVIDIA GPU"
    reason = unavailable("cuda")
    return "CUDA and Triton" if reason is None else f"Triton and torch's products, {slower}: {reason}"


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _product_speed(config: Config, device: torch.device) -> float:
    """FLOP/s of a large matrix product in the dtype of the weights."""
    size, repeats = (8192, 10) if device.type == "cuda" else (512, 10)
    a = torch.ones(size, size, dtype=weight_dtype(config.train, device), device=device)
    a @ a
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        a @ a
    _synchronize(device)
    return repeats * 2 * size**3 / (time.perf_counter() - began)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gigabytes(size: int) -> str:
    return f"{significant(size / 1e9)} GB" if size >= 1e8 else f"{short(size)}B"
