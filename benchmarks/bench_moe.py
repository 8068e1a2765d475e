"""The squared-ReLU MoE layer, from logits to output, against compositions of torch's grouped matmul."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import Compare, Peer, Work, peak_gb
from oracle import assert_close

from yaongi.kernels import moe, moe_route, use_backend
from yaongi.kernels.moe import dispatch, experts_forward, grouped_gemm
from yaongi.kernels.moe import experts_backward as gradients
from yaongi.model.mixers.moe import SharedExpert
from yaongi.train.config import load_config

# (T, D, F, E, K)
FLAGSHIP = (32768, 2048, 512, 64, 6)
SHAPES = [
    (32768, 2048, 256, 64, 6),
    FLAGSHIP,
    (32768, 2048, 1024, 64, 6),
    (32768, 2688, 1856, 128, 6),
    (1024, 2048, 512, 64, 6),
    (65536, 2048, 512, 64, 6),
]
SCALE = 2.5
Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Case:
    """Tensors of a layer; routing is balanced, zipf (load falls as 1/rank) or one (all tokens pick the same)."""

    def __init__(self, shape: tuple[int, int, int, int, int], routing: str) -> None:
        T, D, F, E, self.K = self.T, self.D, self.F, self.E, _ = shape
        torch.manual_seed(0)
        bf16 = {"device": "cuda", "dtype": torch.bfloat16}
        self.x = torch.randn(T, D, **bf16).requires_grad_()
        self.w_up = (torch.randn(E, F, D, **bf16) / D**0.5).requires_grad_()
        self.w_down = (torch.randn(E, D, F, **bf16) / F**0.5).requires_grad_()
        noise = -torch.empty(T, E, device="cuda").exponential_().log()  # Gumbel: the K largest are a weighted sample
        skew = {"balanced": 0.0, "zipf": 1.0, "one": 100.0}[routing]
        logits = noise - skew * torch.arange(1, E + 1, device="cuda").log()
        self.logits = (0.1 * logits).requires_grad_()
        self.bias = torch.zeros(E, device="cuda")
        self.dy = torch.randn(T, D, **bf16)
        self.flops = 4.0 * T * self.K * D * F

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.w_up, self.w_down, self.logits, self.bias

    def forward(self, layer: Layer) -> Callable[[], torch.Tensor]:
        return torch.no_grad()(lambda: layer(*self.inputs))

    def both(self, layer: Layer) -> Callable[[], Any]:
        wanted = self.inputs[:4]
        return lambda: torch.autograd.grad(layer(*self.inputs), wanted, self.dy)


def ours(top_k: int) -> Layer:
    """Return the layer of this library."""

    def layer(
        x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        ids, weights, _ = moe_route(logits, bias, top_k, SCALE)
        return moe(x, w_up, w_down, ids, weights)

    return layer


def composition(top_k: int, *, gather_sum: bool) -> Layer:
    """Return the best-known composition: sort, gather, grouped matmul, squared ReLU, grouped matmul, weight, combine.

    The combine is an index_add, or a gather by the inverse permutation and a sum over the K rows of a token.
    """

    def layer(
        x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        scores = logits.sigmoid()
        ids = (scores + bias).topk(top_k, dim=-1).indices
        weights = scores.gather(-1, ids)
        weights = SCALE * weights / (weights.sum(-1, keepdim=True) + 1e-20)
        order = ids.flatten().argsort()
        offsets = torch.bincount(ids.flatten(), minlength=w_up.shape[0]).cumsum(0).int()
        hidden = torch._grouped_mm(x[order // top_k], w_up.mT, offs=offsets).relu().square()
        rows = torch._grouped_mm(hidden, w_down.mT, offs=offsets)
        if gather_sum:
            inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
            return (rows[inverse].view(*ids.shape, -1) * weights.to(x.dtype).unsqueeze(-1)).sum(1)
        weighted = rows * weights.flatten()[order].to(x.dtype).unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // top_k, weighted)

    return layer


def peers_of(top_k: int) -> dict[str, Layer]:
    """Return compositions of torch's grouped matmul, eager and compiled, with either combine."""
    named = {"index_add": composition(top_k, gather_sum=False), "gather-sum": composition(top_k, gather_sum=True)}
    return named | {f"compiled {name}": torch.compile(layer) for name, layer in named.items()}


def check(case: Case) -> None:
    """Check the tolerance rule (tests/oracle.py) on the first 256 tokens, for the output and all gradients."""
    results = {}
    for name, dtype in (("triton", torch.bfloat16), ("reference", torch.bfloat16), ("exact", torch.float64)):
        with use_backend("reference" if name == "exact" else name):
            ids, weights, _ = moe_route(case.logits[:256].detach(), case.bias, case.K, SCALE)
            leaves = [t.detach().to(dtype).requires_grad_() for t in (case.x[:256], case.w_up, case.w_down)]
            y = moe(*leaves, ids, weights.to(torch.promote_types(dtype, torch.float32)))
            results[name] = (y.detach(), *torch.autograd.grad(y, leaves, case.dy[:256].to(dtype)))
    for kernel, exact, plain in zip(results["triton"], results["exact"], results["reference"], strict=True):
        assert_close(kernel, exact, plain)


@pytest.mark.parametrize("routing", ["balanced", "zipf", "one"])
@pytest.mark.parametrize("direction", ["forward", "forward_and_backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-D{}-F{}-E{}-K{}".format(*s))
def test_moe(shape: tuple[int, int, int, int, int], direction: str, routing: str, compare: Compare) -> None:
    """Time a layer; its floor counts FLOPs alone, 4·T·K·D·F forward and twice that backward."""
    if routing != "balanced" and shape != FLAGSHIP:
        pytest.skip("skewed routing is measured at the flagship's shape")
    case = Case(shape, routing)
    if shape[0] <= 32768 and shape[2] <= 512:
        check(case)
    timed = case.forward if direction == "forward" else case.both
    layers = peers_of(case.K) if routing == "balanced" and shape[0] == 32768 else {}
    peers: dict[str, Peer] = {name: timed(layer) for name, layer in layers.items()}
    work = Work(case.flops * (1 if direction == "forward" else 3))
    call = timed(ours(case.K))
    notes = {"saved": f"{2 * shape[0] * shape[4] * shape[2] / 1e9:.2f} GB", "peak": f"{peak_gb(call):.2f} GB"}
    compare(call, work, peers, notes)


@pytest.mark.parametrize("direction", ["forward", "forward_and_backward"])
def test_shared_expert(direction: str, compare: Compare) -> None:
    """Time the flagship's dense squared-ReLU MLP: the model's, eager, compiled, and the experts' stages with E = 1."""
    config, T = load_config("yaongi-4b").model, 32768
    torch.manual_seed(0)
    shared = SharedExpert(config, torch.device("cuda"), torch.bfloat16)
    up, down = (torch.nn.init.normal_(p.weight, std=0.02) for p in (shared.up_proj, shared.down_proj))
    x, dy = (torch.randn(T, config.hidden_size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    ids, ones = torch.zeros(T, 1, device="cuda", dtype=torch.int32), torch.ones(T, 1, device="cuda")

    def eager(x: torch.Tensor, up: torch.Tensor = up, down: torch.Tensor = down) -> torch.Tensor:
        return torch.nn.functional.linear(torch.nn.functional.linear(x, up).relu().square(), down)

    def stages_of_one(x: torch.Tensor) -> torch.Tensor:
        return moe(x, up[None], down[None], ids, ones)

    def timed(layer: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
        if direction == "forward":
            return torch.no_grad()(lambda: layer(x))
        return lambda: torch.autograd.grad(layer(x), (x, up, down), dy)

    assert_close(shared(x), eager(x.double(), up.double(), down.double()), eager(x))
    work = Work(4.0 * T * up.numel() * (1 if direction == "forward" else 3))
    layers = {"eager": eager, "compiled": torch.compile(eager), "experts' stages": stages_of_one}
    compare(timed(shared), work, {name: timed(layer) for name, layer in layers.items()})


def test_stages(compare: Compare) -> None:
    """Time each stage of the chain at the flagship's shape against its own floor."""
    case = Case(FLAGSHIP, "balanced")
    with torch.no_grad():
        ids, weights, _ = moe_route(case.logits, case.bias, case.K, SCALE)
        x, w_up, w_down, dy = (t.detach() for t in (case.x, case.w_up, case.w_down, case.dy))
        plan = dispatch.dispatch(ids, case.E)
        a = experts_forward.moe_up(x, w_up, plan)
        parts = grouped_gemm.moe_grouped_gemm(a, w_down, plan, weights)
        dh, ga, *_ = gradients.moe_dh(dy, w_down, a, plan, weights)
        dw_up, dw_down, sums = torch.empty_like(w_up), torch.empty_like(w_down), torch.zeros_like(w_up.float())
        calls: dict[str, Callable[[], Any]] = {
            "route": lambda: moe_route(case.logits, case.bias, case.K, SCALE),
            "dispatch": lambda: dispatch.dispatch(ids, case.E),
            "up": lambda: experts_forward.moe_up(x, w_up, plan),
            "down": lambda: grouped_gemm.moe_grouped_gemm(a, w_down, plan, weights),
            "combine": lambda: dispatch.moe_combine(parts, plan.row, case.T, case.K),
            "dh": lambda: gradients.moe_dh(dy, w_down, a, plan, weights),
            "dw_up": lambda: gradients.moe_dw(dh, x, dw_up, plan, gather_left=False),
            "dw_up, added in fp32": lambda: gradients.moe_dw(dh, x, sums, plan, gather_left=False, accumulate=True),
            "dw_down": lambda: gradients.moe_dw(ga, dy, dw_down, plan, gather_left=True),
            "dx": lambda: grouped_gemm.moe_grouped_gemm(dh, w_up, plan, None),
        }
        compare(calls.pop("up"), Work(case.flops / 2), calls)
