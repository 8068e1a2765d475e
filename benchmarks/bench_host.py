"""What a call of an op costs the host: small models and short calls wait for Python.

`host`: of the host alone. `chain`: of host and GPU together, which is about the longer of the two. `graph`: of the GPU
alone, the forward pass recorded and replayed.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bench_shapes import moe_case, newton_schulz_case, norm_case, scan_case
from measure import recorded, report

from yaongi.kernels import mamba_scan

ROUNDS, CHAIN = 5, 20
SPIN = 100_000_000  # clock cycles, more than 50 ms


def chain_us(call: Callable[[], Any], *, behind: bool = False) -> float:
    """Return the microseconds of a call in the fastest of a few rows of calls: host and GPU together.

    Args:
        behind: count the host alone, until the calls have returned; the GPU is busy with something else till then.
    """
    costs = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        if behind:
            torch.cuda._sleep(SPIN)
        start = time.perf_counter()
        for _ in range(CHAIN):
            call()
        if not behind:
            torch.cuda.synchronize()
        costs.append((time.perf_counter() - start) / CHAIN)
    return 1e6 * min(costs)


def with_documents(direction: str) -> Callable[[], Any]:
    case = scan_case(1, 4096, 64, 64, 8, 128)
    ids = torch.arange(4096, device="cuda", dtype=torch.int32)[None] // 1000

    def forward() -> torch.Tensor:
        return mamba_scan(*case.inputs, document_ids=ids)

    return replace(case, forward=forward).call(direction)


CALLS: dict[str, Callable[[str], Callable[[], Any]]] = {
    "moe 2048 tokens": lambda direction: moe_case(2048, 2048, 512, 64, 6).call(direction),
    "mamba_scan 1 x 4096": lambda direction: scan_case(1, 4096, 64, 64, 8, 128).call(direction),
    "mamba_scan 1 x 4096, documents": with_documents,
    "rms_norm 2048 x 2048": lambda direction: norm_case(2048, 2048).call(direction),
    "newton_schulz 64 x (256 x 2048)": lambda direction: newton_schulz_case(64, 256, 2048).call(direction),
    "newton_schulz 8 x (512 x 4096)": lambda direction: newton_schulz_case(8, 512, 4096).call(direction),
}


@pytest.mark.parametrize(
    ("name", "direction"),
    [(name, way) for name in CALLS for way in (("forward",) if "newton" in name else ("forward", "both"))],
)
def test_host(name: str, direction: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time the host's part of a call, the call in a chain, and the GPU's part."""
    call = CALLS[name](direction)
    call()
    costs = {"host_us": chain_us(call, behind=True), "chain_us": chain_us(call)}
    if direction == "forward":
        costs["graph_us"] = chain_us(recorded(call))
    report(benchmark, request, costs)
