"""Triton kernels in the interpreter, on tiny fp32 shapes: indexing, masks and boundaries, without a GPU."""

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import assert_equal_to_float64

from yaongi.kernels.causal_conv1d import reference
from yaongi.kernels.moe import reference as moe_reference
from yaongi.kernels.newton_schulz import reference as newton_schulz_reference
from yaongi.kernels.newton_schulz.op import POLAR_EXPRESS

pytestmark = pytest.mark.interpret


def causal_conv1d_cases() -> list[Any]:
    """Shapes around the strip's length, and every combination of documents, states and activation."""
    shapes = [(2, 21, 40, 4), (1, 1, 8, 4), (2, 2, 260, 3), (1, 9, 16, 2)]
    return list(itertools.product(shapes, (False, True), (False, True), ("silu", None)))


@pytest.mark.parametrize(("shape", "documents", "state", "activation"), causal_conv1d_cases())
def test_causal_conv1d(shape: tuple[int, int, int, int], documents: bool, state: bool, activation: str | None) -> None:
    """Both directions equal the reference in float64, on a slice of a wider tensor."""
    from yaongi.kernels.causal_conv1d import triton_impl

    batch, length, channels, taps = shape
    x = torch.randn(batch, length, channels + 24)[..., 8 : 8 + channels]
    weight, bias = torch.randn(channels, taps), torch.randn(channels) if state else None
    ids = (torch.rand(batch, length) < 0.3).cumsum(1).int() if documents else None
    initial = torch.randn(batch, channels, taps - 1) if state else None
    dy, dfinal = torch.randn(batch, length, channels), torch.randn(batch, channels, taps - 1) if state else None
    inputs = (x, weight, bias, ids, initial, activation)
    wide = tuple(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs)
    actual = (
        *triton_impl.causal_conv1d_triton(*inputs, state),
        *triton_impl.causal_conv1d_backward_triton(dy, dfinal, *inputs),
    )
    exact = (
        *reference.causal_conv1d_reference(*wide, state),
        *reference.causal_conv1d_backward_reference(dy.double(), None if dfinal is None else dfinal.double(), *wide),
    )
    for i, (ours, expected) in enumerate(zip(actual, exact, strict=True)):
        assert_equal_to_float64(ours, expected, 1e-5, f"result {i}")


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(5, 8, 2), (37, 64, 6), (3, 3, 3), (20, 130, 16)])
def test_moe_route_and_dispatch(tokens: int, experts: int, top_k: int) -> None:
    """The same choice, ties included; pairs in a stable sort by expert, bad ids nowhere."""
    from yaongi.kernels.moe.routing import triton_impl

    logits, bias = torch.randn(tokens, experts), torch.zeros(experts)
    logits[1] = logits[1, 0]
    ids, weights, load = triton_impl.moe_route_triton(logits, bias, top_k, 2.5)
    expected = moe_reference.moe_route_reference(logits, bias, top_k, 2.5)
    assert torch.equal(ids, expected[0])
    assert torch.equal(load, expected[2])
    assert_equal_to_float64(weights, expected[1], 1e-6)
    dweights = torch.randn(tokens, top_k)
    dlogits = triton_impl.moe_route_backward_triton(dweights, logits, ids, 2.5)
    assert_equal_to_float64(dlogits, moe_reference.moe_route_backward_reference(dweights, logits, ids, 2.5), 1e-6)
    ids[0, 0], ids[2, 1] = -1, experts + 5
    plan, pairs = triton_impl.dispatch(ids, experts), ids.flatten()
    key = torch.where((pairs >= 0) & (pairs < experts), pairs, experts)
    order, counts = key.argsort(stable=True), torch.bincount(key, minlength=experts + 1)[:experts]
    valid = int(counts.sum())
    assert torch.equal(plan.order[:valid], order[:valid].int())
    assert torch.equal(plan.row[order[:valid]], torch.arange(valid).int())
    assert bool((plan.row[order[valid:]] == -1).all())
    assert torch.equal(plan.offset[1:], counts.cumsum(0).int())
    assert torch.equal(plan.tile_end, ((counts + 127) // 128).cumsum(0).int())


FLAT = [value for step in POLAR_EXPRESS for value in step]


@pytest.fixture
def newton_schulz_in_float32() -> Iterator[Any]:
    """The launchers' module, storing in float32 what a GPU stores in half of it, and in batches of a few matrices."""
    from yaongi.kernels.newton_schulz import triton_impl

    with mock.patch.multiple(triton_impl, STORAGE=torch.float32, DIRECTION=torch.float32, WORKSPACE=1000):
        yield triton_impl


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 20), (3, 20, 5), (1, 8, 24), (1, 70, 9), (2, 9, 530)], ids=str)
@pytest.mark.parametrize("form", ["gram", "standard"])
def test_newton_schulz(shape: tuple[int, ...], form: str, newton_schulz_in_float32: Any) -> None:
    """Padding, transposition, several tiles and several batches."""
    x = torch.randn(shape)
    exact = newton_schulz_reference.newton_schulz_reference(x.double(), FLAT, form)
    assert_equal_to_float64(newton_schulz_in_float32.newton_schulz_triton(x, FLAT, form), exact, 2e-4)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize(("stack", "shape"), [(1, (2, 9, 12)), (2, (3, 9, 6)), (2, (20, 3)), (4, (3, 30))], ids=str)
def test_teon_update(stack: int, shape: tuple[int, ...], masters: bool, newton_schulz_in_float32: Any) -> None:
    """Every tensor in place, the layers of a stack side by side."""
    lists = [[torch.randn(shape) for _ in range(4)] for _ in range(4 if masters else 3)] + ([] if masters else [[]])
    exact = [[t.double() for t in tensors] for tensors in lists]
    settings = (stack, 0.5, 0.9, True, 0.1, FLAT)
    newton_schulz_reference.teon_update_reference(*exact, *settings)
    newton_schulz_in_float32.teon_update_triton(*lists, *settings)
    for ours, expected in zip(lists, exact, strict=True):
        for tensor, wanted in zip(ours, expected, strict=True):
            assert_equal_to_float64(tensor, wanted, 2e-4)
