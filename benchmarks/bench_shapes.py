"""Shapes that nobody tuned, beside the tuned one of their op: how much of its rate per FLOP or byte they keep.

The floor of a call is the larger of its FLOPs and its bytes at the chip's ceilings. `kept` is the share of the floor
that a shape reaches, over the share that the tuned shape reaches in the same run; 0.7 is the aim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from measure import Compare, Work

from yaongi.kernels import causal_conv1d, cross_entropy, mamba_scan, moe, newton_schulz, rms_norm

Tensor = torch.Tensor
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A call, forwards and backwards, and its least work."""

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    forward_work: Work
    both_work: Work

    def call(self, direction: str) -> Callable[[], Any]:
        if direction == "forward":
            return torch.no_grad()(self.forward)
        dy = torch.randn_like(self.forward())
        return lambda: torch.autograd.grad(self.forward(), self.inputs, dy)

    def work(self, direction: str) -> Work:
        return self.forward_work if direction == "forward" else self.both_work


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, **BF16).requires_grad_()


def of_bytes(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Case:
    """A case whose floor is to read its inputs and write its output, and backwards to read both and write gradients."""
    once = sum(t.nbytes for t in inputs)
    out = forward().nbytes
    return Case(forward, inputs, Work(bytes=once + out), Work(bytes=3 * once + 2 * out))


def moe_case(T: int, D: int, F: int, E: int, K: int) -> Case:
    x, w_up, w_down = normal(T, D), normal(E, F, D), normal(E, D, F)
    ids = torch.rand(T, E, device="cuda").topk(K, dim=1).indices.int()
    weights = torch.rand(T, K, device="cuda").requires_grad_()
    flops, matrices, rows = 4.0 * T * K * D * F, w_up.nbytes + w_down.nbytes, 2 * x.nbytes
    return Case(
        lambda: moe(x, w_up, w_down, ids, weights),
        (x, w_up, w_down, weights),
        Work(flops, matrices + rows),
        Work(3 * flops, 3 * matrices + 2 * rows),
    )


def scan_case(B: int, L: int, H: int, P: int, G: int, N: int) -> Case:
    packed = torch.randn(B, L, H * P + 2 * G * N, **BF16)
    x, b, c = packed.split([H * P, G * N, G * N], dim=-1)
    dt, A = torch.randn(B, L, H, **BF16) - 3, -torch.rand(H, device="cuda") - 1
    made = (x.unflatten(-1, (H, P)), dt, A, b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N)))
    inputs = tuple(t.detach().requires_grad_() for t in made)
    flops = 2.0 * B * L * (G * N * 64 + H * P * 64 + 2 * H * P * N)
    once, out = sum(t.nbytes for t in inputs), x.numel() * 2
    return Case(lambda: mamba_scan(*inputs), inputs, Work(flops, once + out), Work(3 * flops, 3 * once + 2 * out))


def conv_case(B: int, L: int, C: int, W: int) -> Case:
    x, weight, bias = normal(B, L, C), normal(C, W), normal(C)
    return of_bytes(lambda: causal_conv1d(x, weight, bias), (x, weight, bias))


def norm_case(T: int, D: int) -> Case:
    x, weight = normal(T, D), normal(D)
    return of_bytes(lambda: rms_norm(x, weight), (x, weight))


def loss_case(T: int, V: int) -> Case:
    logits, targets = normal(T, V), torch.randint(V, (T,), device="cuda")
    return of_bytes(lambda: cross_entropy(logits, targets)[0], (logits,))


def newton_schulz_case(batch: int, rows: int, columns: int) -> Case:
    x = torch.randn(batch, rows, columns, **BF16)
    m, n = min(rows, columns), max(rows, columns)
    work = Work(
        batch * (4.0 * m * m * n + 8 * 2.0 * m**3), 2 * x.nbytes
    )  # in Gram form: first and last product, and n³
    return Case(lambda: newton_schulz(x), (), work, work)


MAKE: dict[str, Callable[..., Case]] = {
    "moe": moe_case,
    "mamba_scan": scan_case,
    "causal_conv1d": conv_case,
    "rms_norm": norm_case,
    "cross_entropy": loss_case,
    "newton_schulz": newton_schulz_case,
}
TUNED = {
    "moe": (32768, 2048, 512, 64, 6),
    "mamba_scan": (8, 4096, 64, 64, 8, 128),
    "causal_conv1d": (8, 4096, 6208, 4),
    "rms_norm": (32768, 2048),
    "cross_entropy": (4096, 32768),
    "newton_schulz": (64, 512, 2048),
}
SHAPES = {
    "moe": [
        (32768, 2048, 256, 64, 6),
        (32768, 2048, 384, 64, 6),
        (32768, 2048, 240, 64, 6),
        (32768, 2048, 512, 256, 8),
        (32768, 2048, 512, 8, 2),
        (32768, 768, 384, 64, 6),
        (8192, 2048, 512, 64, 6),
        (1024, 2048, 512, 64, 6),
        (32768, 2688, 1856, 128, 6),
    ],
    "mamba_scan": [
        (8, 4096, 64, 64, 1, 128),
        (8, 4096, 64, 64, 8, 64),
        (8, 4096, 64, 64, 8, 256),
        (8, 4096, 32, 128, 8, 128),
        (64, 512, 64, 64, 8, 128),
        (2, 4096, 64, 64, 8, 128),
        (1, 262144, 64, 64, 8, 128),
    ],
    "causal_conv1d": [(8, 4096, 6208, 2), (8, 4096, 1000, 4), (64, 512, 6208, 4), (1, 262144, 768, 4)],
    "rms_norm": [(32768, 768), (32768, 1000), (4096, 16384), (262144, 256)],
    "cross_entropy": [(4096, 8192), (4096, 50257), (4096, 131072), (65536, 4096)],
    "newton_schulz": [(66, 2048, 4096), (64, 256, 2048), (8, 512, 4096), (300, 128, 512), (16, 768, 768)],
}


@pytest.mark.parametrize(
    ("op", "shape", "direction"),
    [
        pytest.param(op, shape, direction, id=f"{op}-{'x'.join(map(str, shape))}-{direction}")
        for op, shapes in SHAPES.items()
        for shape in shapes
        for direction in (("forward",) if op == "newton_schulz" else ("forward", "both"))
    ],
)
def test_shapes(op: str, shape: tuple[int, ...], direction: str, compare: Compare) -> None:
    """Time an untuned shape in turn with the tuned one of its op."""
    case, tuned = MAKE[op](*shape), MAKE[op](*TUNED[op])

    def kept(times: dict[str, float]) -> dict[str, str]:
        ours = case.work(direction).floor_ms / times["yaongi"]
        return {"kept": f"{ours / (tuned.work(direction).floor_ms / times['our tuned shape']):.2f}"}

    compare(case.call(direction), case.work(direction), {"our tuned shape": tuned.call(direction)}, kept)
