"""The FP8 kernels in Triton's interpreter: indexing, masks, scales and amax, without a GPU.

The interpreter's casts to 8 bits round towards zero, so here the kernels store float32: what they would have cast.
Bytes are transposed as they are.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import assert_equal_to_float64

from yaongi.kernels.fp8_quantize import reference
from yaongi.kernels.moe8 import reference as moe8_reference
from yaongi.kernels.rms_norm import reference as norm_reference

pytestmark = pytest.mark.interpret
Tensor = torch.Tensor
SHAPES = [(16, 32), (48, 272), (1, 7), (21, 300), (0, 16)]


def uncast(values: Tensor, scale: Tensor) -> Tensor:
    """What is cast, without saturation."""
    return values * scale.to(values.dtype)


@pytest.fixture(autouse=True)
def stored_in_float32() -> Iterator[None]:
    """Patch the launchers and the references to keep what they would cast."""
    from yaongi.kernels.fp8_quantize import row_casts, weight_casts
    from yaongi.kernels.rms_norm import fp8_norm

    with ExitStack() as stack:
        for module in (row_casts, weight_casts, fp8_norm):
            stack.enter_context(mock.patch.object(module, "E4M3", torch.float32))
            stack.enter_context(mock.patch.object(module, "transpose8_triton", reference.transpose8_reference))
        for module in (reference, moe8_reference, norm_reference):
            stack.enter_context(mock.patch.object(module, "quantized", uncast))
        yield


def scalars(*values: float) -> list[Tensor]:
    """Entries of a vector, at multiples of 4 bytes."""
    return list(torch.tensor([0.0, *values])[1:].unbind())


def assert_equal_results(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...], amax: Tensor, wanted: Tensor) -> None:
    for i, (result, expected) in enumerate(zip(ours, exact, strict=True)):
        assert_equal_to_float64(result, expected, 1e-5, f"result {i}")
    torch.testing.assert_close(amax, wanted, rtol=3e-7, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("before", [0.0, 100.0])
def test_quantize8(shape: tuple[int, int], before: float) -> None:
    """A slice of a wider tensor, both orders; amax rises or stays."""
    from yaongi.kernels.fp8_quantize.row_casts import quantize8_triton

    x = torch.randn(shape[0], shape[1] + 16)[:, 8:-8]
    scale, amax, wanted = scalars(4.0, before, before)
    ours = quantize8_triton(x, scale, amax, True, True)
    exact = reference.quantize8_reference(x.double(), scale, wanted, True, True)
    assert_equal_results(ours, exact, amax, wanted)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")], ids=str)
def test_amax_keeps_what_is_not_finite(value: float) -> None:
    from yaongi.kernels.fp8_quantize.row_casts import quantize8_triton

    x = torch.randn(21, 300)
    x[20, 299] = value
    amax = torch.tensor(1.0)
    quantize8_triton(x, torch.tensor(1.0), amax, True, False)
    assert not amax.isfinite()
    assert amax.isnan() == x[20, 299].isnan()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squared_relu8(shape: tuple[int, int]) -> None:
    from yaongi.kernels.fp8_quantize import row_casts

    h, da = (torch.randn(shape[0], shape[1] + 16)[:, 8:-8] for _ in range(2))
    scale, amax, wanted, unit = scalars(4.0, 0.1, 0.1, 0.25)
    ours = row_casts.squared_relu8_triton(h, scale, amax)
    exact = reference.squared_relu8_reference(h.double(), scale, wanted)
    assert_equal_results(ours, exact, amax, wanted)
    a8 = ours[0]
    ours = row_casts.squared_relu8_backward_triton(da, a8, unit, scale, amax)
    exact = reference.squared_relu8_backward_reference(da.double(), a8.double(), unit, scale, wanted)
    assert_equal_results(ours, exact, amax, wanted)


@pytest.mark.parametrize("shape", [(16, 16), (32, 144), (3, 48, 272), (1, 16, 32), (2, 0, 16)], ids=str)
def test_transpose8(shape: tuple[int, ...]) -> None:
    """Every byte, out of a wider tensor; with a dimension of size 1 whose stride is odd."""
    from yaongi.kernels.fp8_quantize.byte_transpose import transpose8_triton

    wide = torch.randint(256, (*shape[:-1], shape[-1] + 32), dtype=torch.uint8)[..., 16:-16]
    x8 = wide.as_strided(wide.shape, (7, *wide.stride()[1:]), 16) if shape[0] == 1 else wide
    ours = transpose8_triton(x8.view(torch.float8_e4m3fn) if shape[0] != 1 else x8)
    assert torch.equal(ours.view(torch.uint8), wide.mT)
    assert ours.is_contiguous()


@pytest.mark.parametrize("largest", [0.0, 1e-40, 1e-38, 3e-5, 1.0, 1.75, 1.7500001, 448.0, 3e38, float("inf")])
@pytest.mark.parametrize("shape", [(16, 32), (3, 48, 112), (0, 16)], ids=str)
def test_quantize_weight8(shape: tuple[int, ...], largest: float) -> None:
    from yaongi.kernels.fp8_quantize.weight_casts import quantize_weight8_triton

    w = (2 * torch.rand(shape) - 1) * min(largest, 3e38)
    if w.numel():
        w.flatten()[-1] = -largest
    ours, exact = quantize_weight8_triton(w), reference.quantize_weight8_reference(w)
    for result, expected in zip(ours, exact, strict=True):
        assert torch.equal(result.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("shape", [(16, 32), (5, 96), (70, 48), (0, 16)], ids=str)
@pytest.mark.parametrize("extra", [False, True])
def test_rms_norm8(shape: tuple[int, int], extra: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions, with more rows than a program's block; the backward's y is the forward's to the bit."""
    from yaongi.kernels.rms_norm import fp8_norm

    monkeypatch.setattr(fp8_norm, "PROGRAMS", 2)
    x, dy, more = (torch.randn(shape[0], shape[1] + 16)[:, 8:-8] for _ in range(3))
    weight = torch.randn(shape[1])
    scale_y, scale_d, amax, wanted = scalars(4.0, 2.0, 0.1, 0.1)
    ours = fp8_norm.rms_norm8_triton(x, weight, 1e-3, scale_y, amax, True)
    exact = norm_reference.rms_norm8_reference(x.double(), weight.double(), 1e-3, scale_y, wanted, True)
    assert_equal_results(ours, exact, amax, wanted)
    y8, _, inverse_rms = ours
    inputs = (dy, more if extra else None, x, weight, inverse_rms)
    wide = tuple(None if t is None else t.double() for t in inputs)
    ours = fp8_norm.rms_norm8_backward_triton(*inputs, scale_y, scale_d, amax)
    exact = norm_reference.rms_norm8_backward_reference(*wide, scale_y, scale_d, wanted)
    assert_equal_results(ours, exact, amax, wanted)
    assert torch.equal(ours[3], y8.mT)


ROUTINGS = {  # T, D, F, E, K, and a change of the ids
    "bad ids": (150, 48, 80, 5, 2, lambda ids: torch.where(ids == 1, -1, torch.where(ids == 2, 9, ids)).int()),
    "all on one expert": (130, 32, 16, 3, 1, lambda ids: ids * 0 + 1),
    "empty experts, several tiles": (20, 144, 272, 3, 2, lambda ids: ids * 0 + torch.tensor([2, 0]).int()),
    "no token": (0, 16, 32, 4, 2, lambda ids: ids),
}


def added_by_moe_dw(
    rows: Tensor, gathered: Tensor, out: Tensor, plan: Any, *, gather_left: bool, accumulate: bool
) -> None:
    """What `moe_dw` adds: the interpreter has no reduction by TMA."""
    from yaongi.kernels.moe.experts_backward import moe_dw

    assert accumulate
    part = torch.empty_like(out)
    moe_dw(rows, gathered, part, plan, gather_left=gather_left)
    out += part


@pytest.mark.parametrize("routing", ROUTINGS)
def test_moe8(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions: tiles that end within an expert, rows that no expert has (NaN), amax of routed pairs alone."""
    from yaongi.kernels.moe8 import fp8_experts

    monkeypatch.setattr(fp8_experts, "moe_dw", added_by_moe_dw)
    T, D, F, E, K, change = ROUTINGS[routing]
    x8, residual, d8, dy, x = (torch.randn(T, D + 16)[:, :D] for _ in range(5))
    x8[:1] = d8[:1] = 100.0  # token 0 stands in for the rows that a tile has too many
    up, down = torch.randn(E, F, D) / 8, torch.randn(E, D, F) / 8
    ids, g = change(torch.rand(T, E).argsort(1)[:, :K].int()), torch.rand(T, K)
    if "bad" in routing:
        ids[0] = -1
    scale, unit, amax, wanted = scalars(4.0, 0.25, 0.1, 0.1)
    forward = (x8, unit, up, down, unit, scale, ids, g, scale)
    ours = fp8_experts.moe8_triton(*forward, amax, residual, torch.float32)
    exact = moe8_reference.moe8_reference(*wide(forward), wanted, residual.double(), torch.float64)
    valid = int(((ids >= 0) & (ids < E)).sum())
    a8 = ours[1]
    assert_equal_results((ours[0], a8[:valid]), (exact[0], exact[1][:valid]), amax, wanted)
    assert a8[valid:].isnan().all()
    sums = [torch.randn(E, F, D), torch.randn(E, D, F)]
    exact_sums = [t.double() for t in sums]
    backward = (d8, unit, dy, x, up.mT.contiguous(), down.mT.contiguous(), unit, scale, ids, g, a8, unit, scale)
    ours = fp8_experts.moe8_backward_triton(*backward, amax, residual, *sums)
    exact = moe8_reference.moe8_backward_reference(*wide(backward), wanted, residual.double(), *exact_sums)
    pairs = (
        *zip(ours[:2], exact[:2], strict=True),
        (ours[2][:valid], exact[2][:valid]),
        *zip(sums, exact_sums, strict=True),
    )
    assert_equal_results(*map(tuple, zip(*pairs, strict=True)), amax, wanted)  # type: ignore[arg-type]


def wide(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments in float64, but for scalars."""
    return tuple(t.double() if t.is_floating_point() and t.dim() else t for t in inputs)
