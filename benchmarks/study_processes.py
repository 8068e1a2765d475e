"""What a training step takes on one GPU and on N, measured in one run.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.study_processes --preset yaongi-4b

First each process trains alone on its GPU, all at once, so that the cards are as warm as later; then all train
together. Times are medians over the steps after two short ones; those of collectives are of the process that came last.
Random tokens, no data needed. It also runs on a CPU, with gloo.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from yaongi.data.row_loader import Batch
from yaongi.model import Yaongi
from yaongi.train.config import Config, load_config
from yaongi.train.distributed.replicas import Replicas
from yaongi.train.optimizer.partition import divide_parameters
from yaongi.train.optimizer.role_optimizer import RoleOptimizer
from yaongi.train.step.clock import Clock
from yaongi.train.step.stepper import Stepper
from yaongi.world import World, init_world, set_determinism

ROWS = {"yaongi-4b": 2, "yaongi-4b-fp8": 2, "yaongi-small": 32, "yaongi-tiny": 1}  # per micro-batch on one GPU
RATES = {"matrix": 2e-3, "vector": 3e-4, "table": 15e-4}
WARM = 2  # micro-batches of each of as many steps before the timed ones: the first compiles, the next is recorded


class Stopwatch:
    """The durations of the parts of a step, by name, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clocks: dict[str, list[Clock]] = defaultdict(list)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its duration on the device recorded under `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            clock = Clock(self._device)
            with clock:
                result = function(*args, **kwargs)
            self._clocks[name].append(clock)
            return result

        return call

    def milliseconds(self) -> dict[str, list[float]]:
        """Return the durations of each part, in order, and forget them."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        found = {name: [1e3 * clock.last() for clock in clocks] for name, clocks in self._clocks.items()}
        self._clocks.clear()
        return found


class Trainer:
    """A model with random tokens to train on, in one process or several."""

    def __init__(self, config: Config, world: World, rows: int, dtype: torch.dtype) -> None:
        train = config.train
        self.world, self.watch, self.tokens = world, Stopwatch(world.device), train.batch_tokens
        self.model = Yaongi(config.model, device=world.device, dtype=dtype)
        self.engine = Replicas(self.model, world, divide_parameters(self.model, train, world.size))
        self.optimizer = RoleOptimizer(self.model, train, dtype, self.engine)
        token_bytes = torch.ones(config.model.vocab_size, dtype=torch.int64)
        self.stepper = Stepper(self.model, self.optimizer, train, world, token_bytes)
        for name in ("zero_gradients", "reduce_gradients", "gather_weights"):
            setattr(self.engine, name, self.watch.timed(name, getattr(self.engine, name)))
        self.optimizer.step = self.watch.timed("step", self.optimizer.step)  # type: ignore[method-assign]
        generator = torch.Generator().manual_seed(1)
        count = train.batch_rows // rows
        ids = torch.randint(config.model.vocab_size, (count, rows, train.row_tokens), generator=generator)
        mine = ids[count * world.rank // world.size : count * (world.rank + 1) // world.size].to(world.device)
        nothing = torch.zeros(rows, dtype=torch.int64)
        self.batches = [Batch(part, torch.zeros_like(part, dtype=torch.int32), nothing, nothing) for part in mine]

    def step(self, batches: Sequence[Batch]) -> float:
        """Do one step, and return its loss."""
        result = self.stepper(batches, RATES, 1e-3)
        assert result.bad is None, result.bad
        return result.loss

    def measure(self, steps: int, batches: Sequence[Batch]) -> tuple[list[float], dict[str, list[float]]]:
        """Return the seconds of `steps` steps after `WARM` short ones, and the milliseconds of their parts."""
        for _ in range(WARM):
            self.step(batches[:WARM])
        self.synchronize()
        self.watch.milliseconds()
        marks = [time.perf_counter()]
        for _ in range(steps):
            self.step(batches)
            marks.append(time.perf_counter())
        self.synchronize()
        marks[-1] = time.perf_counter()  # the last step's update too
        return [b - a for a, b in itertools.pairwise(marks)], self.watch.milliseconds()

    def synchronize(self) -> None:
        """Wait for the device, and for the other processes."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        self.world.barrier()

    def digest(self) -> int:
        """Return a sum of all weights' bits, which is the same only for the same weights."""
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        return sum(int(p.detach().view(whole[p.element_size()]).sum()) for p in self.model.parameters())


def release(device: torch.device) -> None:
    """Free the memory of what is no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def alone(config: Config, device: torch.device, rows: int, dtype: torch.dtype, steps: int) -> dict[str, float]:
    """Return the seconds of a step of one process, by the time that a micro-batch adds."""
    count = config.train.batch_rows // rows
    short, long = max(1, min(2, count - 1)), min(6, count)
    release(device)
    one = Trainer(config, World(0, 1, device), rows, dtype)
    seconds = [min(one.measure(steps, one.batches[:length])[0]) for length in (short, long)]
    peak = peak_bytes(device)
    micro = (seconds[1] - seconds[0]) / (long - short) if long > short else 0.0
    whole = seconds[1] + (count - long) * micro
    return {"seconds": whole, "micro_ms": 1e3 * micro, "fixed_ms": 1e3 * (seconds[1] - long * micro), "peak": peak}


def together(config: Config, world: World, rows: int, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """Return the seconds of a step of all processes, and the milliseconds of its parts."""
    release(world.device)
    everyone = Trainer(config, world, rows, dtype)
    seconds, parts = everyone.measure(steps, everyone.batches)
    peak, beside = peak_bytes(world.device), beside_torch(world.device)
    figures: dict[str, Any] = {"seconds": statistics.median(seconds), "peak": peak, "beside_torch": beside}
    gathered = world.gather(parts)
    for name in ("reduce_gradients", "gather_weights"):  # who comes last waits for nobody
        last = [min(times) for times in zip(*(one[name] for one in gathered), strict=True)]
        figures[name] = statistics.median(last)
    own = [s - g for s, g in zip(parts["step"], parts["gather_weights"], strict=True)]
    figures["optimizer"] = max(world.gather(statistics.median(own)))
    figures["zero_gradients"] = statistics.median(parts["zero_gradients"])
    return figures


def same_bits(config: Config, world: World, rows: int, dtype: torch.dtype, steps: int) -> bool:
    """Return whether two runs have the same losses, and all processes the same weights at their ends."""

    def train() -> tuple[list[float], int]:
        run = Trainer(config, world, rows, dtype)
        return [run.step(run.batches) for _ in range(steps)], run.digest()

    results = []
    for _ in range(2):
        release(world.device)
        results += world.gather(train())
    return all(result == results[0] for result in results)


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def beside_torch(device: torch.device) -> int:
    """Return the bytes of the GPU that are used, but not by torch's allocator: context, NCCL, graphs."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def study(asked: argparse.Namespace, world: World) -> dict[str, Any]:
    """Measure, and return the figures."""
    config = load_config(asked.preset)
    if asked.batch_tokens:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_tokens=asked.batch_tokens))
    cuda = world.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    most = config.train.batch_rows // world.size
    rows = min(asked.rows or ROWS[asked.preset], most)
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "preset": asked.preset,
        "processes": world.size,
        "rows": rows,
        "batch_tokens": config.train.batch_tokens,
    }
    base = min(asked.rows_alone or ROWS[asked.preset], config.train.batch_rows)
    began = time.perf_counter()

    def say(what: str) -> None:
        if world.is_main:
            print(f"{time.perf_counter() - began:6.1f} s: {what}", file=sys.stderr, flush=True)

    if not asked.no_baseline:
        say(f"each of {world.size} alone")
        ones = world.gather(alone(config, world.device, base, dtype, asked.steps))
        figures["alone"] = [one | {"tokens_per_second": config.train.batch_tokens / one["seconds"]} for one in ones]
    say("together")
    figures["together"] = together(config, world, rows, dtype, asked.steps)
    figures["tokens_per_second"] = config.train.batch_tokens / figures["together"]["seconds"]
    if not asked.no_baseline:
        mean = statistics.mean(one["tokens_per_second"] for one in figures["alone"])
        figures["times_one"] = figures["tokens_per_second"] / mean
    if asked.bits:
        short = dataclasses.replace(config.train, batch_tokens=min(config.train.batch_tokens, 131072))
        say(f"two runs of {asked.bits} steps")
        few = min(rows, short.batch_rows // world.size)
        figures["same_bits"] = same_bits(dataclasses.replace(config, train=short), world, few, dtype, asked.bits)
    say("done")
    release(world.device)
    return figures


def lines(figures: dict[str, Any]) -> str:
    """Return the figures as lines to read."""
    ours = figures["together"]
    size = f"{figures['preset']}, {figures['batch_tokens']:,} tokens a step, {figures['rows']} rows a micro-batch"
    rows = [f"{size}, {figures['processes']} x {figures['device']}"]
    for rank, one in enumerate(figures.get("alone", [])):
        rows.append(
            f"one ({rank})     {one['tokens_per_second']:10,.0f} tokens/s  {one['micro_ms']:.1f} ms a micro-batch + "
            f"{one['fixed_ms']:.1f} ms  peak {one['peak'] / 1e9:.1f} GB"
        )
    times = f"  {figures['times_one']:.2f} x one" if "times_one" in figures else ""
    rows.append(f"together    {figures['tokens_per_second']:10,.0f} tokens/s{times}  {ours['seconds']:.4f} s a step")
    exchange = ours["reduce_gradients"] + ours["gather_weights"]
    rows.append(
        f"            reduce {ours['reduce_gradients']:.1f} + gather {ours['gather_weights']:.1f} = {exchange:.1f} ms, "
        f"optimizer {ours['optimizer']:.1f} ms, zeros {ours['zero_gradients']:.1f} ms, "
        f"peak {ours['peak'] / 1e9:.1f} GB, beside torch {ours['beside_torch'] / 1e9:.2f} GB"
    )
    if "same_bits" in figures:
        rows.append(f"            two runs have the same bits: {'yes' if figures['same_bits'] else 'NO'}")
    return "\n".join(rows)


def main() -> None:
    """Measure, print, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=ROWS, default="yaongi-4b")
    parser.add_argument("--rows", type=int, default=0, help="rows per micro-batch of the processes together")
    parser.add_argument("--rows-alone", type=int, default=0, help="the same of a process alone")
    parser.add_argument("--batch-tokens", type=int, default=0, help="tokens per step; default: the preset's")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--bits", type=int, default=0, help="also compare two runs of so many steps bit for bit")
    parser.add_argument("--no-baseline", action="store_true", help="don't measure one GPU")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    asked = parser.parse_args()
    world = init_world("auto")
    set_determinism(True)
    figures = study(asked, world)
    if world.is_main:
        print(lines(figures), flush=True)
        if asked.out:
            asked.out.write_text(json.dumps(figures, indent=1))
    world.close()


if __name__ == "__main__":
    main()
