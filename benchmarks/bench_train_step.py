"""A complete training step, forward, backward and optimizer, against a composition of today's libraries.

Ours is the trainer's own `Stepper`: Engram, float32 master weights and gradients, clipping, load balance. The
composition trains the same layers without Engram in bf16 alone, with an eager Muon. Both get random tokens without
document boundaries. A step of n micro-batches takes n·t + t₀. Steps of two lengths give t and t₀, and these give the
tokens/s of a global batch.
"""

import dataclasses
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench_optimizer_step import eager_muon
from composition import Composition, mamba_ssm_scan
from measure import MATMUL_FLOPS_PER_S, Absent, report
from torch.profiler import ProfilerActivity, profile

from yaongi.data.row_loader import Batch
from yaongi.model import Yaongi
from yaongi.model.count import flops_per_token
from yaongi.train.config import Training, load_config
from yaongi.train.optimizer.role_optimizer import RoleOptimizer
from yaongi.train.optimizer.roles import parameter_roles
from yaongi.train.step.stepper import Stepper
from yaongi.world import World, set_determinism

CUDA = torch.device("cuda")
# Rows that fit into 80 GB beside the state.
MICRO_ROWS = {"yaongi-4b": 2, "yaongi-4b-fp8": 2, "yaongi-4b-pairs": 1, "yaongi-small": 32}
PEER_ROWS = {"yaongi-4b": 3, "yaongi-4b-pairs": 2}  # rows of 4096 tokens that fit with the composition
LENGTHS = (2, 6)  # micro-batches per timed step
PARTS = {  # of a step, by substrings of kernel names; the first match counts
    "experts": ("moe_",),
    "casts to fp8": ("_quantize8", "_transpose8", "_squared_relu8", "_weight8"),
    "scan and step sizes": ("mamba_",),
    "convolution": ("_causal_conv1d", "_conv1d"),
    "norms": ("_norm", "_rms"),
    "optimizer": ("_teon", "_newton_schulz", "symmetric_product", "adam"),
    "attention": ("flex", "flash", "fmha", "sdpa", "cudnn"),
    "dense products": ("nvjet", "gemm", "cutlass", "cublas"),
}


@pytest.fixture(autouse=True)
def emptied() -> Iterator[None]:
    """Free a case's GPU memory, and reset torch's choice of kernels for the next one."""
    yield
    torch.use_deterministic_algorithms(False)
    gc.collect()
    torch.cuda.empty_cache()


def seconds(step: Callable[[int], Any], rounds: int = 3) -> dict[int, float]:
    """Return the wall-clock seconds of the fastest step of each length, host and GPU together."""
    best = dict.fromkeys(LENGTHS, float("inf"))
    for length in LENGTHS:
        step(length)
    for _ in range(rounds):
        for length in LENGTHS:
            torch.cuda.synchronize()
            start = time.perf_counter()
            step(length)
            torch.cuda.synchronize()
            best[length] = min(best[length], time.perf_counter() - start)
    return best


def figures(times: dict[int, float], micro_tokens: int, train: Training, flops: float) -> dict[str, Any]:
    """Return tokens/s and model TFLOP/s at the preset's global batch, and the times they are computed from."""
    short, long = LENGTHS
    micro = (times[long] - times[short]) / (long - short)
    fixed = times[short] - short * micro
    tokens_per_s = train.batch_tokens / (train.batch_tokens / micro_tokens * micro + fixed)
    return {
        "tokens_per_s": tokens_per_s,
        "tflops": tokens_per_s * flops / 1e12,
        "of_floor": tokens_per_s * flops / MATMUL_FLOPS_PER_S["bf16"],
        "micro_ms": 1e3 * micro,
        "optimizer_ms": 1e3 * fixed,
        "peak": f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB",
    }


def breakdown(step: Callable[[], Any]) -> dict[str, float]:
    """Return milliseconds of a step by part; kernels of no part are `other`, and `idle` is the GPU's idle time."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - start)
    parts: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        name = event.key.lower()
        part = next((part for part, marks in PARTS.items() if any(mark in name for mark in marks)), "other")
        parts[part] += event.self_device_time_total / 1e3
    return dict(sorted(parts.items(), key=lambda item: -item[1])) | {"idle": wall - sum(parts.values())}


@pytest.mark.parametrize("preset", MICRO_ROWS)
def test_ours(preset: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time the trainer's step with its defaults: deterministic, micro-batches replayed as a CUDA graph."""
    set_determinism(True)
    measure_ours(preset, benchmark, request)


def test_without_determinism(benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time the flagship's step with non-deterministic kernels allowed: the cost of determinism."""
    assert not torch.are_deterministic_algorithms_enabled()
    measure_ours("yaongi-4b", benchmark, request)


def trainer_step(model: Yaongi, train: Training, rows: int, device: torch.device) -> Callable[[int], None]:
    """Return the trainer's step on random tokens, as a function of its number of micro-batches."""
    optimizer = RoleOptimizer(model, train, torch.bfloat16)
    vocab_size = model.config.vocab_size
    stepper = Stepper(model, optimizer, train, World(0, 1, device), torch.ones(vocab_size, dtype=torch.int64))
    ids = torch.randint(vocab_size, (rows, train.row_tokens), device=device)
    batch = Batch(ids, torch.zeros_like(ids, dtype=torch.int32), *(torch.zeros(rows, dtype=torch.int64),) * 2)

    def step(length: int) -> None:
        result = stepper([batch] * length, dict.fromkeys(optimizer.peak_lr, 1e-4), bias_rate=1e-3)
        assert result.bad is None, result.bad

    return step


def measure_ours(preset: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Report tokens/s and parts of the trainer's step."""
    config = load_config(preset)
    train, rows = config.train, MICRO_ROWS[preset]
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model = Yaongi(config.model, device=CUDA, dtype=torch.bfloat16)
    step = trainer_step(model, train, rows, CUDA)
    flops = flops_per_token(config.model, model.count_parameters().active, train.row_tokens)
    info = figures(seconds(step), rows * train.row_tokens, train, flops)
    report(benchmark, request, info | breakdown(lambda: step(LENGTHS[0])))


@pytest.mark.parametrize("preset", PEER_ROWS)
def test_composition(preset: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time the peer: no Engram, no master weights, gradients and momentum buffers in bf16."""
    try:
        scan = mamba_ssm_scan()
    except ImportError:
        pytest.skip(f"composition is {Absent('absent: pip install mamba-ssm').reason}")
    config = load_config(preset)
    bare = dataclasses.replace(config.model, engram=())
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model = Yaongi(bare, device=CUDA, dtype=torch.bfloat16)
    loss = Composition(model, scan)
    named, roles = dict(model.named_parameters()), parameter_roles(model)
    rest = torch.optim.AdamW([p for n, p in named.items() if roles[n].kind == "adamw"], lr=1e-4, fused=True)
    matrices = [p for n, p in named.items() if roles[n].kind != "adamw"]
    momenta = [torch.zeros_like(p) for p in matrices]
    ids = torch.randint(bare.vocab_size, (PEER_ROWS[preset], config.train.row_tokens), device=CUDA)

    def step(length: int) -> None:
        for _ in range(length):
            (loss(ids) / length).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0, foreach=True)
        eager_muon(matrices, momenta, lr=1e-4)
        rest.step()
        model.zero_grad(set_to_none=True)

    flops = flops_per_token(bare, model.count_parameters().active, config.train.row_tokens)
    info = figures(seconds(step), ids.numel(), config.train, flops)
    assert loss(ids).isfinite()
    report(benchmark, request, info)
