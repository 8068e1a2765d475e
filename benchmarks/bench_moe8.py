"""The squared-ReLU experts in FP8 against those in bf16 and a composition of torch's scaled grouped matmul.

`pytest benchmarks/bench_moe8.py --benchmark-only -s` prints a table. Everybody starts from casts of x, of the gradient
and of the weights, which other parts of a layer or an optimizer step make, and adds the weights' gradients in float32.
All calls are CUDA graphs, as the trainer runs them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import Compare, Peer, Work, peak_gb, recorded
from oracle import EXPERTS_ERROR, frobenius_error

from yaongi.kernels import moe, moe8, moe8_backward, moe_route, quantize8, quantize_weight8, use_backend
from yaongi.kernels.moe import dispatch, grouped_gemm
from yaongi.kernels.moe.experts_backward import moe_dh
from yaongi.kernels.moe.experts_forward import moe_up

Tensor = torch.Tensor
E4M3 = torch.float8_e4m3fn
FLAGSHIP = (8192, 2048, 512, 64, 6)  # T, D, F, E, K
SHAPES = [FLAGSHIP, (16384, 2048, 512, 64, 6), (32768, 2048, 512, 64, 6), (32768, 2688, 1856, 128, 6)]
SCALE_X, SCALE_A, SCALE_D, SCALE_H = 32.0, 2.0, 32.0, 8.0


def scalar(value: float) -> Tensor:
    return torch.tensor(value, device="cuda")


class Case:
    """Tensors of a layer with balanced routing, and their casts."""

    def __init__(self, T: int, D: int, F: int, E: int, K: int) -> None:
        torch.manual_seed(0)
        bf16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        self.x, self.dy = (torch.randn(T, D, **bf16) for _ in range(2))
        self.w_up, self.w_down = torch.randn(E, F, D, **bf16) / D**0.5, torch.randn(E, D, F, **bf16) / F**0.5
        logits = 0.1 * torch.randn(T, E, device="cuda")
        self.ids, self.g, _ = moe_route(logits, torch.zeros(E, device="cuda"), K, 2.5)
        self.amax = torch.zeros(3, device="cuda")
        self.x8, _ = quantize8(self.x, scalar(SCALE_X), self.amax[2])
        self.d8, _ = quantize8(self.dy, scalar(SCALE_D), self.amax[2])
        self.up8, self.up8t, self.unit_up = quantize_weight8(self.w_up)
        self.down8, self.down8t, self.unit_down = quantize_weight8(self.w_down)
        self.units = {scale: scalar(1 / scale) for scale in (SCALE_X, SCALE_A, SCALE_D, SCALE_H)}
        self.scales = {scale: scalar(scale) for scale in self.units}
        self.sums = torch.zeros(E, F, D, device="cuda"), torch.zeros(E, D, F, device="cuda")
        self.flops = 4.0 * T * K * D * F
        # What the compositions need: the pairs in the order of experts, and the end of each expert's rows.
        self.order = self.ids.flatten().argsort(stable=True)
        self.inverse = self.order.argsort()
        self.ends = torch.bincount(self.ids.flatten(), minlength=E).cumsum(0).int()

    def ours(self, both: bool) -> tuple[Tensor, ...]:
        routing = self.unit_up, self.unit_down, self.ids, self.g
        operands = self.x8, self.units[SCALE_X], self.up8, self.down8, *routing
        y, a8 = moe8(*operands, self.scales[SCALE_A], self.amax[0])
        if not both:
            return (y,)
        gradient = self.d8, self.units[SCALE_D], self.dy, self.x, self.up8t, self.down8t, *routing
        saved = a8, self.units[SCALE_A], self.scales[SCALE_H], self.amax[1], None
        dx, dg, _ = moe8_backward(*gradient, *saved, *self.sums)
        return y, dx, dg

    def bf16(self, both: bool) -> tuple[Tensor, ...]:
        if not both:
            with torch.no_grad():
                return (moe(self.x, self.w_up, self.w_down, self.ids, self.g),)
        leaves = self.x.detach().requires_grad_(), self.g.detach().requires_grad_()
        y = moe(leaves[0], self.w_up, self.w_down, self.ids, leaves[1], weight_gradients=self.sums)
        return y.detach(), *torch.autograd.grad(y, leaves, self.dy)

    def scaled(self, left: Tensor, unit: Tensor, w8: Tensor, unit_w: Tensor) -> Tensor:
        """Rows times their experts' w8 (E, width, inner), by torch; it takes a unit per row and per column."""
        units = unit.expand(len(left)).contiguous(), unit_w.expand(w8.shape[:2]).contiguous()
        return torch._scaled_grouped_mm(left, w8.mT, *units, offs=self.ends, out_dtype=torch.bfloat16)

    def composed(self, both: bool) -> tuple[Tensor, ...]:
        """Gather, four scaled grouped products, two bf16 ones for the weights, and what lies between them compiled."""
        tokens, shape = self.order // self.ids.shape[1], (*self.ids.shape, -1)
        g = self.g.flatten()[self.order]
        rows = gathered(self.x8, tokens)
        a8, a = activation(self.scaled(rows, self.units[SCALE_X], self.up8, self.unit_up), self.scales[SCALE_A])
        parts = self.scaled(a8, self.units[SCALE_A], self.down8, self.unit_down)
        y = combined(parts, g, self.inverse, shape)
        if not both:
            return (y,)
        dact = self.scaled(gathered(self.d8, tokens), self.units[SCALE_D], self.down8t, self.unit_down)
        dh8, dh, ga, dg = activation_gradient(dact, a, g, self.scales[SCALE_H])
        self.sums[0].add_(torch._grouped_mm(dh.mT, self.x[tokens], offs=self.ends))
        self.sums[1].add_(torch._grouped_mm(self.dy[tokens].mT, ga, offs=self.ends))
        dx = combined(self.scaled(dh8, self.units[SCALE_H], self.up8t, self.unit_up), None, self.inverse, shape)
        return y, dx, dg[self.inverse].view(self.ids.shape)


def gathered(codes: Tensor, tokens: Tensor) -> Tensor:
    """Rows of 8-bit floats; torch gathers bytes."""
    return codes.view(torch.uint8)[tokens].view(E4M3)


def cast(values: Tensor, scale: Tensor) -> Tensor:
    return (values * scale).clamp(-448, 448).to(E4M3)


@torch.compile
def activation(h: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    a = h.float().relu().square()
    return cast(a, scale), a.bfloat16()


@torch.compile
def activation_gradient(dact: Tensor, a: Tensor, g: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, act = dact.float(), a.float()
    dh = 2 * act.sqrt() * g[:, None] * wide
    return cast(dh, scale), dh.bfloat16(), (g[:, None] * act).bfloat16(), (wide * act).sum(1)


@torch.compile
def combined(parts: Tensor, g: Tensor | None, inverse: Tensor, shape: tuple[int, int, int]) -> Tensor:
    rows = parts if g is None else parts * g[:, None]
    return rows[inverse].view(shape).float().sum(1).bfloat16()


@pytest.mark.parametrize("direction", ["forward", "forward_and_backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-D{}-F{}-E{}-K{}".format(*s))
def test_moe8(shape: tuple[int, int, int, int, int], direction: str, compare: Compare) -> None:
    """Time the experts without router and casts of x, dy and weights; FLOPs as in bench_moe.py."""
    case, both = Case(*shape), direction != "forward"
    for result, exact, peer in zip(case.ours(both), case.bf16(both), case.composed(both), strict=True):
        assert frobenius_error(result, exact) <= 0.1
        assert frobenius_error(peer, exact) <= 0.1
    if shape == FLAGSHIP:
        with use_backend("reference", op="moe8"):
            expected = case.ours(both)
        for result, plain in zip(case.ours(both), expected, strict=True):
            assert frobenius_error(result, plain) <= EXPERTS_ERROR

    def call(layer: Callable[[bool], Any]) -> Callable[[], Any]:
        return recorded(lambda: layer(both))

    peers: dict[str, Peer] = {"bf16 moe": call(case.bf16), "_scaled_grouped_mm": call(case.composed)}
    notes = {"peak": f"{peak_gb(lambda: case.ours(both)):.2f} GB"}
    compare(call(case.ours), Work(case.flops * (3 if both else 1), kind="fp8"), peers, notes)


@pytest.mark.parametrize("stage", ["up", "down", "dh", "dx"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda s: "T{}-D{}-F{}-E{}-K{}".format(*s))
def test_product(shape: tuple[int, int, int, int, int], stage: str, compare: Compare) -> None:
    """Time each of the four products in FP8 with its epilogue, against the stage in bf16 and torch's product alone."""
    case = Case(*shape)
    plan, g = dispatch.dispatch(case.ids, len(case.w_up)), case.g.contiguous()
    unit, scale, amax = case.units[SCALE_X], case.scales[SCALE_A], case.amax[0]
    up, down = (grouped_gemm.Fp8(unit_w, scale, torch.bfloat16, unit, case.units[SCALE_A], amax)
                for unit_w in (case.unit_up, case.unit_down))  # fmt: skip
    a8, a = moe_up(case.x8, case.up8, plan, up), moe_up(case.x, case.w_up, plan)
    tokens = case.order // case.ids.shape[1]
    x8, d8 = gathered(case.x8, tokens), gathered(case.d8, tokens)
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]] = {
        "up": (
            lambda: moe_up(case.x8, case.up8, plan, up),
            lambda: moe_up(case.x, case.w_up, plan),
            lambda: case.scaled(x8, unit, case.up8, case.unit_up),
        ),
        "down": (
            lambda: grouped_gemm.moe_grouped_gemm(a8, case.down8, plan, g, down),
            lambda: grouped_gemm.moe_grouped_gemm(a, case.w_down, plan, g),
            lambda: case.scaled(a8, unit, case.down8, case.unit_down),
        ),
        "dh": (
            lambda: moe_dh(case.d8, case.down8t, a8, plan, g, down),
            lambda: moe_dh(case.dy, case.w_down, a, plan, g),
            lambda: case.scaled(d8, unit, case.down8t, case.unit_down),
        ),
        "dx": (
            lambda: grouped_gemm.moe_grouped_gemm(a8, case.up8t, plan, None, up),
            lambda: grouped_gemm.moe_grouped_gemm(a, case.w_up, plan, None),
            lambda: case.scaled(a8, unit, case.up8t, case.unit_up),
        ),
    }
    ours, bf16, scaled = map(recorded, calls[stage])
    compare(ours, Work(case.flops / 2, kind="fp8"), {"bf16 stage": bf16, "_scaled_grouped_mm alone": scaled})
