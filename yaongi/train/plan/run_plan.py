"""The plan of a run: model size, steps, FLOPs, memory and whether it fits, time and cost."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi, flops_per_token
from yaongi.train.build import build_model, weight_dtype
from yaongi.train.config import Config, Running
from yaongi.train.formatting import duration, gigabytes, short
from yaongi.train.plan.advice import advise
from yaongi.train.plan.machines import MACHINES, as_measured, like_h100
from yaongi.train.plan.memory import Memory, MemoryForecast, memory_of
from yaongi.train.plan.passes import Passes, evaluation_seconds, guessed_passes, passes_here
from yaongi.train.plan.scaling import REACHED, StepSeconds, step_seconds
from yaongi.train.plan.speed import fp8_here, fp8_layers, kernels_here, link_speed, links_here, step_cost
from yaongi.train.plan.spreading import expert_degree, spread_cost
from yaongi.world import World

TOKEN_BYTES = 2  # of a token in a shard


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
    parallel: str  # replicate, experts or fsdp
    expert_degree: int  # processes over which the experts of a layer are spread; 1: each holds all
    flops_per_token: float
    memory: Memory
    available: int  # bytes of memory of the device
    step: StepSeconds
    seconds: float
    checkpoint: int  # bytes
    disk: int  # bytes of what the run keeps, with a checkpoint being written, and of its tokens
    dollars: float
    advice: str  # empty if it fits
    kernels: str  # the implementations that run here and, on other devices than an H100, how much slower they are
    precision: str  # what runs in FP8; empty if nothing does
    basis: str  # what the time follows from
    links: str  # the speed of the links between several GPUs; empty where it was not measured

    @property
    def share(self) -> int:
        """Rows that micro-batches must divide."""
        return self.batch_rows if self.parallel == "replicate" else self.batch_rows // self.processes

    @property
    def fits(self) -> bool:
        """Whether the run fits into memory."""
        return not self.advice

    def record(self) -> dict[str, Any]:
        """Return the figures for `metrics.jsonl`."""
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
        figures = {name: getattr(self, name) for name in names} | {"predicted_memory": self.memory.total}
        return figures | ({"precision": self.precision} if self.precision else {})

    def lines(self) -> str:
        """Return the figures as lines to print."""
        accumulation = -(-self.batch_rows // self.micro_rows // self.processes)
        parts = [(n, getattr(self.memory, n)) for n in self.memory.__dataclass_fields__]
        by_part = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts if size)
        flops = self.flops_per_token * self.tokens
        how = f", --parallel {self.parallel}" if self.processes > 1 else ""
        how += f" over {self.expert_degree}" if self.expert_degree > 1 else ""
        verdict = "fits" if self.fits else f"does not fit: {self.advice}"
        rows = [
            ("model", f"{self.preset}, {self.parameters:,} parameters, {self.active:,} active"),
            ("device", f"{self.device}, {self.processes} process{'es' if self.processes > 1 else ''}{how}"),
            ("tokens", f"{self.tokens:,} in {self.steps:,} steps of {self.batch_rows} x {self.row_tokens}"),
            ("micro-batch", f"{self.micro_rows} x {self.row_tokens}, {accumulation} a step and process"),
            ("kernels", self.kernels),
            ("FLOPs", f"{flops:.2e}, {self.flops_per_token / 1e9:.3g} GFLOP per token"),
            ("memory", f"{gigabytes(self.memory.total)} of {gigabytes(self.available)}: {verdict}"),
            ("", by_part),
            ("time", f"about {duration(self.seconds)} at {short(self.tokens / self.seconds)} tokens/s, {self.basis}"),
            ("checkpoint", gigabytes(self.checkpoint)),
            ("disk", f"about {gigabytes(self.disk)}: checkpoints, model, tokens"),
        ]
        if self.processes > 1 and self.parallel != "fsdp":
            rows.insert(-2, ("", self._step_line()))
        if self.precision:
            rows.insert(5, ("precision", self.precision))
        if self.links:
            rows.insert(2, ("links", self.links))
        if self.dollars:
            rows.append(("cost", f"about ${self.dollars:,.2f}"))
        return "\n".join(f"{name:<12} {text}" for name, text in rows)

    def _step_line(self) -> str:
        """Return the parts of a step."""
        step, of = self.step, self.step.total / 100
        tokens = f"tokens to experts {step.dispatch / of:.0f} %, " if self.expert_degree > 1 else ""
        return (
            f"a step: micro-batches {step.micro_batches / of:.0f} %, {tokens}update {step.update / of:.0f} %, "
            f"exchange {step.exchange / of:.0f} %"
        )


def make_plan(config: Config, tokenizer: Tokenizer | None, world: World, domains: int = 0) -> Plan:
    """Work out the figures; this takes a second or two.

    Args:
        tokenizer: needed unless the plan is for another machine (`plan_for`).
        domains: number of those whose held-out text is measured.

    Raises:
        ValueError: the global batch can't be divided among the processes, or settings don't go together.
    """
    train, run = config.train, config.run
    machine = MACHINES.get(run.plan_for)
    device = world.device if machine is None else torch.device("cuda")
    processes = run.processes or world.size
    precision = fp8_here(config.model, device) if machine is None else fp8_layers(config.model, machine.has_fp8)
    model = build_model(config, tokenizer, "meta", dtype=weight_dtype(train, device))
    forecast = MemoryForecast(model, config, device, processes, machine, expert_degree(run, world))
    _check_processes(run, forecast.parallel, precision)
    fits = run.micro_rows or min(world.gather(forecast.rows_that_fit()))
    rows = micro_rows(config, processes, forecast.parallel, fits)
    memory, counts = forecast(rows), model.count_parameters()
    flops = flops_per_token(config.model, counts.active, train.row_tokens)
    passes = _passes(config, tokenizer, model, rows, flops, device)
    cost, basis = step_cost(model, train, rows, flops, passes.speed, device), passes.basis
    if like_h100(run.plan_for, device):
        cost, basis = as_measured(cost, basis, rows * train.row_tokens, config)
    cost = spread_cost(cost, model, forecast.degree, rows * train.row_tokens, run.recompute)
    links, bandwidth = ("", None) if machine is not None or run.processes else _links(world)
    step = step_seconds(cost, processes, forecast.ownership.size, bandwidth)
    tokens = train.steps * train.batch_tokens
    seconds = train.steps * step.total + evaluation_seconds(config, passes, processes, domains)
    share = train.batch_rows if forecast.parallel == "replicate" else train.batch_rows // processes
    return Plan(
        preset=config.preset,
        device=_name(device) if machine is None else machine.name,
        parameters=counts.total,
        active=counts.active,
        tokens=tokens,
        steps=train.steps,
        batch_rows=train.batch_rows,
        micro_rows=rows,
        row_tokens=train.row_tokens,
        processes=processes,
        parallel=forecast.parallel,
        expert_degree=forecast.degree,
        flops_per_token=flops,
        memory=memory,
        available=memory_of(device) if machine is None else machine.memory,
        step=step,
        seconds=seconds,
        checkpoint=forecast.checkpoint_bytes,
        disk=(run.keep_last + 1) * forecast.checkpoint_bytes + 2 * counts.total + TOKEN_BYTES * tokens,
        dollars=seconds / 3600 * run.dollars_per_hour * processes,
        advice="" if forecast.fits(rows) else advise(share, rows, run.recompute, forecast.fits, forecast.enough),
        kernels=kernels_here(device, passes.speed) if machine is None else machine.kernels,
        precision=precision,
        basis=basis,
        links=links,
    )


def _passes(
    config: Config, tokenizer: Tokenizer | None, model: Yaongi, rows: int, flops: float, device: torch.device
) -> Passes:
    """Return what the model's passes take, here or on the machine of `plan_for`."""
    machine = MACHINES.get(config.run.plan_for)
    if machine is None:
        return passes_here(config, tokenizer, model, rows, flops, device)
    return guessed_passes(machine.speed, flops * config.train.row_tokens, "guessed from the GPU's published speed")


def _check_processes(run: Running, parallel: str, precision: str) -> None:
    """Check that their number is only planned, and what only whole weights on each process can do."""
    if run.processes and not run.dry_run and run.plan_for == "none":
        raise ValueError(f"train: --processes must come with --dry-run, got {run.processes}: torchrun sets it")
    if run.evaluate_tasks != "none" and parallel != "replicate":
        raise ValueError(f"train: --evaluate-tasks must be with --parallel replicate, got {parallel}")
    if precision and parallel == "fsdp":
        raise ValueError(
            "train: fp8 must run with --parallel replicate, got fsdp: its scales and weights aren't sharded"
        )


def _links(world: World) -> tuple[str, float | None]:
    """Measure the links between several GPUs; return what to say, and the bytes per second of an exchange."""
    if world.size == 1 or world.device.type != "cuda":
        return "", None
    speed = link_speed(world)
    return links_here(speed, one_host=os.environ.get("LOCAL_WORLD_SIZE") == str(world.size)), REACHED * speed


def _name(device: torch.device) -> str:
    threads = f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else threads


def micro_rows(config: Config, processes: int, parallel: str, fits: int) -> int:
    """Return the rows per micro-batch: as configured, or as many as fit.

    With several processes that is the largest number up to `fits` with which no process waits long for another: the
    rows of the one with the most micro-batches are within 2 % of the least possible.

    Raises:
        ValueError: the rows don't divide the global batch, or there are fewer micro-batches than processes.
    """
    rows, wanted = config.train.batch_rows, config.run.micro_rows
    together = parallel != "replicate"  # the processes meet in each micro-batch, so each has as many
    if together:
        if rows % processes:
            raise ValueError(f"train: the rows of a batch must be a multiple of {processes} processes, got {rows}")
        rows //= processes
    if wanted and rows % wanted:
        whose = "a process" if together else "a batch"
        raise ValueError(f"train: micro_rows must divide the {rows} rows of {whose}, got {wanted}")
    least = 1 if together else processes  # micro-batches
    sizes = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n >= least]
    if not sizes or (wanted and wanted not in sizes):
        got = rows // (wanted or 1)
        advice = f"--micro-rows {sizes[-1]}" if sizes else f"--batch-tokens {processes * config.train.row_tokens}"
        raise ValueError(
            f"train: batch must be at least {processes} micro-batches for {processes} processes, got {got}: "
            f"try {advice}"
        )
    if wanted:
        return wanted
    fitting = [n for n in sizes if n <= max(1, fits)] or sizes[:1]
    busiest = {n: -(-rows // n // least) * n for n in fitting}  # rows of the process with the most micro-batches
    return max(n for n in fitting if busiest[n] <= 1.02 * min(busiest.values()))
