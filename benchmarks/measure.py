"""Helpers of the benchmarks: the chip's ceilings, interleaved timing, and the figures of a row."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

COPY_BYTES_PER_S = 3.02e12  # read + write, measured on an H100 80 GB HBM3
MATMUL_FLOPS_PER_S = {"bf16": 731e12, "fp8": 1453e12}  # 8192³ on random data, measured likewise
ROUNDS = 30


@dataclass(frozen=True)
class Work:
    """The least work of a call: floating-point operations, and bytes read and written once."""

    flops: float = 0.0
    bytes: float = 0.0
    kind: str = "bf16"

    @property
    def floor_ms(self) -> float:
        """The least time that any implementation takes on this chip."""
        return 1e3 * max(self.flops / MATMUL_FLOPS_PER_S[self.kind], self.bytes / COPY_BYTES_PER_S)


@dataclass(frozen=True)
class Absent:
    """A peer that isn't installed, and how to get it."""

    reason: str


Peer = Callable[[], Any] | Absent
Compare = Callable[..., dict[str, float]]


def interleaved_ms(candidates: dict[str, Callable[[], Any]], flush: Callable[[], Any]) -> dict[str, float]:
    """Return the median milliseconds of each candidate over ROUNDS rounds in which all run in turn."""
    for candidate in candidates.values():
        for _ in range(3):
            candidate()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, candidate in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush()
            start.record()
            candidate()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(s.elapsed_time(e) for s, e in pairs) for name, pairs in events.items()}


def recorded(call: Callable[[], Any]) -> Callable[[], None]:
    """Return the replay of a call as a CUDA graph, so that the host's time doesn't count."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return replay_of(graph, call)


def replay_of(graph: torch.cuda.CUDAGraph, used: Any) -> Callable[[], None]:
    """Return the graph's replay, which keeps the tensors that the graph uses."""

    def replay(_: Any = used) -> None:
        graph.replay()

    return replay


def peak_gb(call: Callable[[], Any], *, beyond_results: bool = False) -> float:
    """Return the peak memory of a call beyond what was allocated before, with or without its results, in GB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    counted = torch.cuda.memory_allocated() if beyond_results else before
    del results
    return (torch.cuda.max_memory_allocated() - counted) / 1e9


def figures(times: dict[str, float], work: Work) -> dict[str, Any]:
    """Return a row's figures: ms, TFLOP/s, GB/s, the fraction of the floor, and each peer's ms and our speed-up."""
    ours = times["yaongi"]
    info: dict[str, Any] = {"ms": ours, "floor_ms": work.floor_ms, "of_floor": work.floor_ms / ours}
    if work.flops:
        info["tflops"] = work.flops / ours / 1e9
    if work.bytes:
        info["gb_per_s"] = work.bytes / ours / 1e6
    for name, ms in times.items():
        if name != "yaongi":
            info[f"{name} ms"] = ms
            info[f"x {name}"] = ms / ours
    return info


def line_of(name: str, info: dict[str, Any]) -> str:
    """Return a row as text."""
    line = f"{name:<58} {info['ms']:8.4f} ms  {100 * info['of_floor']:3.0f} % of the floor"
    if "tflops" in info:
        line += f"  {info['tflops']:5.0f} TFLOP/s"
    if "gb_per_s" in info:
        line += f"  {info['gb_per_s']:5.0f} GB/s"
    for key, value in info.items():
        if key.startswith("x "):
            line += f"  | {key[2:]} {info[f'{key[2:]} ms']:.4f} ms, x {value:.2f}"
        elif isinstance(value, str) and key not in ("gpu", "torch"):
            line += f"  | {key} {value}"
    return line


def machine() -> dict[str, str]:
    """Return the GPU and the torch version of the figures."""
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}


def report(benchmark: Any, request: pytest.FixtureRequest, info: dict[str, Any]) -> None:
    """Report a row of figures; pytest-benchmark's own timing isn't used."""
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    benchmark.extra_info.update(info | machine())
    shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in info.items())
    print(f"\n{request.node.name.removeprefix('test_')}: " + ", ".join(shown))
