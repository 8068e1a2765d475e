"""The optimizer step of the complete flagship, against eager Muon and torch's optimizers on the same parameters.

The parameters are all 3.9 B of yaongi-4b without Engram's tables, with random gradients. Ours keeps float32 master
weights and gradients, and a bf16 momentum buffer per matrix; the peers keep no master weights, and bf16 for everything
else. They run one after another, since together they wouldn't fit in the GPU's memory.
"""

import dataclasses
import gc
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench_newton_schulz import torch_standard, work_of
from measure import COPY_BYTES_PER_S, MATMUL_FLOPS_PER_S, peak_gb, report
from oracle import assert_close

from yaongi.kernels.newton_schulz.op import POLAR_EXPRESS
from yaongi.kernels.newton_schulz.reference import teon_update_reference
from yaongi.model import Yaongi, load_preset
from yaongi.train.config import Training
from yaongi.train.optimizer.partition import MATRIX
from yaongi.train.optimizer.role_optimizer import RoleOptimizer
from yaongi.train.optimizer.roles import parameter_roles

LR = {"matrix": 0.02, "vector": 3e-3, "table": 15e-3}
ROUNDS = 7
CHECKED = "backbone.layers.1.mixer.shared_experts.up_proj.weight"  # the matrix whose update is checked
Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def emptied() -> Iterator[None]:
    """Free a case's GPU memory."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def flagship() -> Yaongi:
    """Return yaongi-4b in bf16 with small random weights, made on the GPU."""
    config = dataclasses.replace(load_preset("yaongi-4b"), engram=())
    model = Yaongi(config, device="meta", dtype=torch.bfloat16).to_empty(device="cuda")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def median_ms(step: Callable[[], Any]) -> float:
    """Return median milliseconds by events; L2 isn't flushed, since a step reads far more than it holds."""
    for _ in range(2):
        step()
    events = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def size_of(model: Yaongi) -> dict[str, str]:
    """Return a report's entries about the parameters."""
    return {"parameters": f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B"}


def give_gradients(model: Yaongi, dtype: torch.dtype | None = None) -> None:
    """Set random gradients, in each parameter's own dtype unless another is given."""
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, device="cuda", dtype=torch.bfloat16).to(dtype or parameter.dtype)


def floor_ms(model: Yaongi) -> float:
    """Return the time to read and write everything once, plus that of the Gram form's products."""
    roles = parameter_roles(model)
    bytes_ = flops = 0.0
    for name, parameter in model.named_parameters():
        moments = 8 + 8 if roles[name].kind == "adamw" else 2 + 2
        bytes_ += parameter.numel() * (4 + moments + 4 + 4 + 2)  # gradient, moments, master weight (4 + 4), cast
        if roles[name].kind == "adamw":
            continue
        rows = [s.stop - s.start for s in roles[name].splits if s.kind == "muon"] or [parameter.shape[-2]]
        for m in rows:
            flops += parameter.shape[:-2].numel() * work_of(1, m, parameter.shape[-1]).flops
    return 1e3 * (bytes_ / COPY_BYTES_PER_S + flops / MATMUL_FLOPS_PER_S["bf16"])


def check_one_matrix(model: Yaongi, optimizer: RoleOptimizer) -> None:
    """Check the tolerance rule (tests/oracle.py) for a shared expert's master weight after one first step."""
    parameter, state = model.get_parameter(CHECKED), optimizer.tensors()[CHECKED]
    before = {key: state[key].clone() for key in ("master", "momentum")}
    optimizer.step()
    flat = [value for step in POLAR_EXPRESS for value in step]
    results = []
    for dtype, storage in ((torch.float64, None), (torch.float32, torch.float16)):
        master, gradient = before["master"].to(dtype), parameter.grad.to(dtype)  # type: ignore[union-attr]
        momentum, cast = before["momentum"].clone(), parameter.detach().to(dtype)
        settings = (1, LR[MATRIX], 0.95, True, 0.1, flat)
        teon_update_reference([cast], [gradient], [momentum], [master], *settings, storage=storage)
        results.append(master)
    assert_close(state["master"], results[0], results[1], CHECKED)
    assert torch.equal(parameter.detach(), state["master"].bfloat16())


def check_it_moves(model: Yaongi, step: Callable[[], Any]) -> None:
    """Check that a peer's step changes a matrix to finite values."""
    weight = model.get_parameter(CHECKED).detach()
    before = weight.clone()
    step()
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)


def test_ours(benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time all that RoleOptimizer.step does: Teon, Muon, AdamW, master weights, casts."""
    model = flagship()
    optimizer = RoleOptimizer(model, Training(), torch.bfloat16)
    optimizer.set_lr(LR)
    give_gradients(model, torch.float32)
    check_one_matrix(model, optimizer)
    workspace = peak_gb(optimizer.step)
    info = {"ms": median_ms(optimizer.step), "floor_ms": floor_ms(model), "workspace": f"{workspace:.2f} GB"}
    report(benchmark, request, size_of(model) | info)


def test_adamw_fused(benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time torch's fused AdamW on everything, bf16 with bf16 moments and no master weights."""
    model = flagship()
    give_gradients(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    check_it_moves(model, optimizer.step)
    report(benchmark, request, size_of(model) | {"ms": median_ms(optimizer.step)})


@pytest.mark.parametrize("orthogonalise", [torch_standard, torch.compile(torch_standard)], ids=["eager", "compiled"])
def test_muon(orthogonalise: Callable[[Tensor], Tensor], benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time Muon as a good user writes it: foreach passes, a batch per shape, no master weights; fused AdamW."""
    model = flagship()
    give_gradients(model)
    roles = parameter_roles(model)
    named = dict(model.named_parameters())
    rest = torch.optim.AdamW([p for n, p in named.items() if roles[n].kind == "adamw"], lr=3e-3, fused=True)
    matrices = [p for n, p in named.items() if roles[n].kind != "adamw"]
    momenta = [torch.zeros_like(p) for p in matrices]

    def step() -> None:
        eager_muon(matrices, momenta, orthogonalise=orthogonalise)
        rest.step()

    check_it_moves(model, step)
    report(benchmark, request, size_of(model) | {"ms": median_ms(step)})


@torch.no_grad()
def eager_muon(
    matrices: list[Tensor],
    momenta: list[Tensor],
    lr: float = 0.02,
    mu: float = 0.95,
    orthogonalise: Callable[[Tensor], Tensor] = torch_standard,
) -> None:
    """Update in place; in_proj is orthogonalised as one matrix here."""
    gradients = [p.grad for p in matrices]
    torch._foreach_mul_(momenta, mu)
    torch._foreach_add_(momenta, gradients)
    directions = torch._foreach_add(gradients, momenta, alpha=mu)
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for i, direction in enumerate(directions):
        by_shape[direction.shape].append(i)
    for shape, members in by_shape.items():
        size = len(members) if len(shape) == 2 else 1  # an expert tensor is a batch of its own
        for first in range(0, len(members), size):
            batch = members[first : first + size]
            o = orthogonalise(torch.stack([directions[i] for i in batch]).view(-1, *shape[-2:]))
            torch._foreach_copy_([directions[i] for i in batch], list(o.view(len(batch), *shape).unbind()))
    torch._foreach_mul_(matrices, 1 - lr * 0.1)
    scales = [-lr * math.sqrt(p.shape[-2] / p.shape[-1]) for p in matrices]
    torch._foreach_mul_(directions, scales)
    torch._foreach_add_(matrices, directions)


def test_torch_muon(benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time torch.optim.Muon on the 2-D matrices, a fourth of the parameters; it doesn't take the experts' 3-D ones."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon is absent: pip install 'torch>=2.9'")
    model = flagship()
    give_gradients(model)
    roles = parameter_roles(model)
    matrices = [p for n, p in model.named_parameters() if roles[n].kind != "adamw" and p.dim() == 2]
    optimizer = torch.optim.Muon(matrices, lr=0.02)
    check_it_moves(model, optimizer.step)
    share = f"{sum(p.numel() for p in matrices) / 1e9:.2f} B of them"
    report(benchmark, request, size_of(model) | {"ms": median_ms(optimizer.step), "takes": share})
