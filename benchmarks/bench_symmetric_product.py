"""The symmetric product at Newton-Schulz's shapes, against torch's full product and quack's symmetric one."""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import Absent, Compare, Peer, Work
from oracle import assert_close

from yaongi.kernels import symmetric_product, use_backend

SHAPES = [
    (8, 2048, 8512),
    (64, 512, 2048),
    (66, 2048, 4096),
    (88, 1024, 2048),
    (8, 2048, 2048),
    (64, 512, 512),
    (1, 4096, 4096),
    (1, 8192, 8192),
]
LAUNCHES = 2000


def quack_peer(x: torch.Tensor, c: torch.Tensor | None) -> Peer:
    """Return quack's symmetric GEMM if it is installed."""
    if importlib.util.find_spec("quack") is None:
        return Absent("pip install quack-kernels")
    from quack.gemm_interface import gemm_symmetric

    return lambda: gemm_symmetric(x, x.mT, C=c)


@pytest.mark.parametrize("addend", [False, True], ids=["", "addend"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x({s[1]}x{s[2]})")
def test_symmetric_product(shape: tuple[int, int, int], addend: bool, compare: Compare) -> None:
    """Time S = X·Xᵀ (+ C) in fp16. TFLOP/s count the full product; the floor counts only the needed half."""
    batch, m, n = shape
    torch.manual_seed(0)
    x = torch.randn(batch, m, n, device="cuda", dtype=torch.float16) / n**0.5
    c = torch.randn(batch, m, m, device="cuda", dtype=torch.float16) if addend else None
    c = c + c.mT if c is not None else None
    check_against_float64(x[:1], None if c is None else c[:1])
    half = batch * m * (m + 1) * n  # 2 · m·(m + 1)/2 · n
    size = 2 * batch * (m * n + (2 if addend else 1) * m * m)
    matmul = (lambda: torch.baddbmm(c, x, x.mT)) if c is not None else (lambda: torch.bmm(x, x.mT))
    peers: dict[str, Peer] = {"torch": matmul, "quack": quack_peer(x, c)}
    compare(lambda: symmetric_product(x, c=c), Work(half, size), peers)


def check_against_float64(x: torch.Tensor, c: torch.Tensor | None) -> None:
    """Check the tolerance rule (tests/oracle.py) for one matrix of the batch."""
    with use_backend("cuda"):
        ours = symmetric_product(x, c=c)
    with use_backend("reference"):
        plain = symmetric_product(x, c=c)
        exact = symmetric_product(x.double(), c=None if c is None else c.double())
    assert_close(ours, exact, plain)


def host_us(call: Callable[[], Any]) -> float:
    """Return host microseconds per call, the best of ten runs that don't wait for the GPU in between."""
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(LAUNCHES // 10):
            call()
        best = min(best, (time.perf_counter() - start) / (LAUNCHES // 10) * 1e6)
    torch.cuda.synchronize()
    return best


def test_host_cost(benchmark: Any) -> None:
    """Time the host per call of a CUDA op, against torch's bmm and add, at a size with negligible GPU time."""
    x = torch.randn(1, 128, 128, device="cuda", dtype=torch.float16)
    out = torch.empty(1, 128, 128, device="cuda", dtype=torch.float16)
    launcher = torch.ops.yaongi_cuda.symmetric_product.default
    calls: dict[str, Callable[[], Any]] = {
        "symmetric_product": lambda: symmetric_product(x),
        "its launcher in C++": lambda: launcher(x, None, None, 1.0, 1.0, out),
        "torch.bmm": lambda: torch.bmm(x, x),
        "torch.add": lambda: torch.add(x, x),
    }
    costs = {name: host_us(call) for name, call in calls.items()}
    benchmark.pedantic(calls["symmetric_product"], rounds=5, iterations=10)
    benchmark.extra_info.update({f"{name} us": cost for name, cost in costs.items()})
    print("host cost a call: " + ", ".join(f"{name} {cost:.1f} us" for name, cost in costs.items()))
