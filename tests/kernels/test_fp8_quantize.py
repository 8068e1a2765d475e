"""The casts to FP8: against a table of the codes, their definitions, and on a GPU against the emulation."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import assert_codes_close
from support import WITHOUT_SCHEMA, assert_refused, backends, bad_calls, checked_mode, device_of

from yaongi.kernels import (
    quantize8,
    quantize_weight8,
    squared_relu8,
    squared_relu8_backward,
    transpose8,
    use_backend,
)
from yaongi.kernels.fp8_quantize.reference import power_of_two_scale

Tensor = torch.Tensor
E4M3 = torch.float8_e4m3fn
FLAGSHIP = [(8192, 3072), (8192, 1024), (8192, 10304), (4096 + 16, 2048)]


def scalar(value: float, device: str = "cpu") -> Tensor:
    return torch.tensor(value, device=device)


def nearest_codes(values: Tensor) -> Tensor:
    """The E4M3 code nearest to each float64, ties to the even one, saturated: by a table of all codes."""
    magnitudes = torch.arange(127, dtype=torch.uint8).view(E4M3).double()  # 0 to 448; code 127 is NaN
    size = values.abs().clamp(max=448)
    above = torch.searchsorted(magnitudes, size.nan_to_num(0)).clamp(max=126)
    below = (above - 1).clamp(min=0)
    to_below, to_above = size - magnitudes[below], magnitudes[above] - size
    down = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    code = torch.where(down, below, above) + 128 * torch.signbit(values)
    return torch.where(values.isnan(), 127, code).to(torch.uint8).view(E4M3)


def assert_same_codes(actual: Tensor, expected: Tensor) -> None:
    """Assert equal values; NaN is any NaN, and ±0 are equal."""
    assert torch.equal(actual.cpu().half().nan_to_num(999), expected.cpu().half().nan_to_num(999))


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("exponent", [-12, -3, 0, 1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value(dtype: torch.dtype, exponent: int, backend: str) -> None:
    """Halves between codes, subnormals, what saturates, infinities and NaNs, in both orders."""
    device = device_of(backend, "quantize8")
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).view(256, 256)
    amax = scalar(0.0, device)
    x8, x8t = quantize8(x.to(device), scalar(2.0**exponent, device), amax, row=True, column=True)
    assert_same_codes(x8, nearest_codes((x.float() * 2.0**exponent).double()))
    assert_same_codes(x8t, x8.cpu().mT)
    assert amax.isnan()


@pytest.mark.parametrize("backend", backends("triton"))
def test_halves_between_all_codes_go_to_the_even_one(backend: str) -> None:
    device = device_of(backend, "quantize8")
    magnitudes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    halves = (magnitudes[1:] + magnitudes[:-1]) / 2
    around = torch.stack([halves, halves.nextafter(scalar(0.0)), halves.nextafter(scalar(1e9))]).repeat(1, 2)
    around[:, 126:] *= -1
    x8, _ = quantize8(around.to(device), scalar(1.0, device), scalar(0.0, device))
    assert_same_codes(x8, nearest_codes(around.double()))


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.0e38, -7.0, 0.0])
@pytest.mark.parametrize("before", [0.0, 5.0, float("inf"), float("nan")])
def test_amax_is_the_largest_magnitude(before: float, value: float, backend: str) -> None:
    """Whatever was there before, and wherever the value is; NaN wins over infinity."""
    device = device_of(backend, "quantize8")
    x = torch.rand(35, 300, device=device)
    x[34, 299] = value
    wanted = torch.maximum(scalar(before), x.abs().amax().cpu())
    amax = scalar(before, device)
    x8, _ = quantize8(x, scalar(1.0, device), amax)
    assert torch.equal(amax.cpu().nan_to_num(-1), wanted.nan_to_num(-1))
    assert_same_codes(x8, nearest_codes(x.cpu().double()))


@pytest.mark.parametrize("backend", backends("triton"))
def test_only_what_is_wanted_is_returned(backend: str) -> None:
    device = device_of(backend, "quantize8")
    x, scale = torch.randn(32, 48, device=device), scalar(64.0, device)
    both = quantize8(x, scale, scalar(0.0, device), row=True, column=True)
    for row, column in ((True, False), (False, True)):
        amax = scalar(0.0, device)
        found = quantize8(x, scale, amax, row=row, column=column)
        assert [t.numel() for t in found] == [32 * 48 * row, 32 * 48 * column]
        assert_same_codes(found[column], both[column])
        assert amax == x.abs().max()


@pytest.mark.parametrize("largest", [1e-42, 1e-30, 0.01, 0.875, 1.0, 1.7499999, 1.75, 1.7500001, 2.0, 448.0, 3.4e38])
def test_the_scale_is_the_largest_power_of_two_that_does_not_saturate(largest: float) -> None:
    size = scalar(largest)
    scale = power_of_two_scale(size).double()
    assert torch.frexp(scale).mantissa == 0.5
    assert scale * size.double() <= 448
    assert 2 * scale * size.double() > 448 or scale == 2.0**126
    assert (1 / power_of_two_scale(size)).double() * scale == 1


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 80), (5, 32, 16), (1, 16, 48), (0, 16, 32), (10304, 2048)], ids=str)
def test_quantize_weight8(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    device = device_of(backend, "quantize_weight8")
    w = 0.02 * torch.randn(shape).to(dtype)
    w8, w8t, unit = quantize_weight8(w.to(device))
    scale = power_of_two_scale(w.abs().amax().float()) if w.numel() else scalar(1.0)
    assert unit.cpu() == 1 / scale
    assert_same_codes(w8, nearest_codes((w.float() * scale).double()))
    assert_same_codes(w8t, w8.cpu().mT)
    assert w8t.is_contiguous()
    if w.numel():
        assert 224 < w8.float().abs().max() <= 448


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf")])
def test_weights_of_zeros_and_bad_weights(value: float, backend: str) -> None:
    """Zeros stay zeros with unit 1; what isn't finite is seen in every product."""
    device = device_of(backend, "quantize_weight8")
    w = torch.zeros(16, 32, device=device)
    w[3, 5] = value
    w8, _, unit = quantize_weight8(w)
    if value == 0:
        assert unit == 1
        assert not w8.float().any()
    else:
        assert unit.isnan()
        assert w8.float().isnan().all()


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(128, 128), (16, 1040), (144, 16), (5, 48, 272), (0, 16)], ids=str)
def test_transpose8_moves_every_byte(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    device = device_of(backend, "transpose8")
    x = torch.randint(256, shape, dtype=torch.uint8)
    y8 = transpose8(x.view(dtype).to(device))
    assert torch.equal(y8.cpu().view(torch.uint8), x.mT)
    assert y8.is_contiguous()


def test_squared_relu8_and_its_gradient() -> None:
    """Against autograd, where the casts are exact: squares of whole numbers, and gradients of few bits."""
    h = torch.tensor([[-3.0, -0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 8.0]], dtype=torch.float64).repeat(16, 2)
    da = torch.tensor([[1.0, -2.0, 0.5, 4.0]], dtype=torch.float64).repeat(16, 4)
    leaf = h.clone().requires_grad_()
    (dh,) = torch.autograd.grad(leaf.relu().square(), leaf, da)
    amax, damax = scalar(0.0), scalar(0.0)
    a8, a8t = squared_relu8(h, scalar(2.0), amax)
    assert torch.equal(a8.double() / 2, h.relu().square())
    assert torch.equal(a8t.double(), a8.double().mT)
    dh8, dh8t = squared_relu8_backward(da, a8, scalar(0.5), scalar(4.0), damax)
    assert torch.equal(dh8.double() / 4, dh)
    assert torch.equal(dh8t.double(), dh8.double().mT)
    assert (amax, damax) == (64.0, dh.abs().max())


def test_the_errors_of_a_cast() -> None:
    """Of normal numbers, whatever the scale: 2.65e-2; and of relu(h)²'s gradient a cosine of at least 0.998."""
    x = torch.randn(512, 512, dtype=torch.float64)
    for scale in (4.0, 16.0, 64.0):
        x8, _ = quantize8(x, scalar(scale), scalar(0.0))
        error = float((x8.double() / scale - x).norm() / x.norm())
        assert 2.5e-2 < error < 2.8e-2
    da = torch.randn_like(x)
    a8, _ = squared_relu8(x, scalar(16.0), scalar(0.0))
    dh8, _ = squared_relu8_backward(da, a8, scalar(1 / 16), scalar(16.0), scalar(0.0))
    cosine = torch.nn.functional.cosine_similarity(dh8.double().flatten(), (2 * x.relu() * da).flatten(), dim=0)
    assert cosine >= 0.998


@pytest.mark.gpu
@pytest.mark.parametrize("shape", FLAGSHIP, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_equal_the_emulation(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """At the flagship's shapes: the codes, amax to two units in the last place, transposes to the byte, two runs."""
    h, da = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    scale, unit = scalar(16.0, "cuda"), scalar(1 / 16, "cuda")
    a8 = squared_relu8(h, scale, scalar(0.0, "cuda"))[0]

    def run() -> dict[str, Tensor]:
        amax = torch.zeros(3, device="cuda")
        found = (
            *quantize8(h, scale, amax[0], row=True, column=True),
            *squared_relu8(h, scale, amax[1]),
            *squared_relu8_backward(da, a8, unit, scale, amax[2]),
        )
        return {f"result {i}": t for i, t in enumerate(found)} | {"amax": amax}

    first, second = run(), run()
    with use_backend("reference"):
        expected = run()
    torch.testing.assert_close(first.pop("amax"), expected["amax"], rtol=2.4e-7, atol=0)
    for i, (name, codes) in enumerate(first.items()):
        assert_codes_close(codes, expected[name], name)
        assert torch.equal(codes.view(torch.uint8), second[name].view(torch.uint8))
        if i % 2:
            assert torch.equal(codes.view(torch.uint8), first[f"result {i - 1}"].view(torch.uint8).mT)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    x = torch.zeros(2**16 + 16, 2**15 + 48, dtype=torch.bfloat16, device="cuda")
    x[-1, -1], amax = 3.0, scalar(0.0, "cuda")
    x8, x8t = quantize8(x, scalar(2.0, "cuda"), amax, row=True, column=True)
    assert amax == 3
    assert x8[-1, -1].float() == x8t[-1, -1].float() == 6
    assert x8.view(torch.uint8).count_nonzero() == x8t.view(torch.uint8).count_nonzero() == 1


@pytest.mark.gpu
def test_capture_and_replay() -> None:
    """A replay reads the scale and raises amax where they are."""
    x, scales = torch.randn(64, 96, device="cuda"), torch.tensor([0.0, 8.0, 0.0], device="cuda")
    scale, amax = scales[1], scales[2]
    quantize8(x, scale, amax, row=True, column=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x8, x8t = quantize8(x, scale, amax, row=True, column=True)
    x.mul_(3)
    scales.copy_(torch.tensor([0.0, 2.0, 0.0]))
    graph.replay()
    assert amax == x.abs().max()
    assert_same_codes(x8, nearest_codes(2 * x.cpu().double()))
    assert_same_codes(x8t, x8.cpu().mT)


def test_opcheck() -> None:
    ops, x = torch.ops.yaongi, torch.randn(16, 32)
    a8 = x.abs().to(E4M3)
    for row, column in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.quantize8.default, (x, scalar(2.0), scalar(0.0), row, column))
    torch.library.opcheck(ops.transpose8.default, (a8,), test_utils=WITHOUT_SCHEMA)
    torch.library.opcheck(ops.quantize_weight8.default, (x,))
    torch.library.opcheck(ops.squared_relu8.default, (x, scalar(2.0), scalar(0.0)))
    backward = (x, a8, scalar(0.5), scalar(2.0), scalar(0.0))
    torch.library.opcheck(ops.squared_relu8_backward.default, backward, test_utils=WITHOUT_SCHEMA)


FLOATS = "must be float16 or bfloat16 or float32 or float64, got"
GOOD = {"x": torch.ones(2, 8), "scale": scalar(1.0), "amax": scalar(0.0)}
GOOD_BACKWARD = {
    "da": torch.ones(2, 8),
    "a8": torch.ones(2, 8).to(E4M3),
    "unit": scalar(1.0),
    "scale": scalar(1.0),
    "amax": scalar(0.0),
}


def bad_arguments() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    yield {"x": 1.0}, TypeError, "x must be a tensor, got float"
    yield {"x": torch.ones(2, 8).int()}, TypeError, f"x {FLOATS} int32"
    yield {"x": torch.ones(8)}, ValueError, "x must be (T, D), got (8,)"
    yield {"x": torch.ones(8, 2).mT}, ValueError, "x must have stride 1 along D, got strides (1, 2)"
    yield {"scale": 1.0}, TypeError, "scale must be a tensor, got float"
    yield {"scale": torch.ones(1)}, ValueError, "scale must be (), got (1,)"
    yield {"scale": torch.ones((), dtype=torch.float64)}, TypeError, "scale must be float32, got float64"
    yield {"amax": torch.ones(2, 8)}, ValueError, "amax must be (), got (2, 8)"
    yield (
        {"amax": torch.ones((), device="meta")},
        TypeError,
        "amax must be on cpu like the first tensor, got meta",
    )
    yield {"row": 1}, TypeError, "row must be a bool, got int"
    yield {"row": False}, ValueError, "row must be True where column is False, got False"


@bad_calls(bad_arguments())
def test_bad_arguments(bad: Any) -> None:
    assert_refused(quantize8, GOOD, bad)


@bad_calls(
    [
        ({"a8": torch.ones(2, 8)}, TypeError, "a8 must be float8_e4m3fn, got float32"),
        ({"a8": torch.ones(2, 9).to(E4M3)}, ValueError, "a8 must be (T, F) = (2, 8), got (2, 9)"),
        ({"unit": torch.ones(2)}, ValueError, "unit must be (), got (2,)"),
    ]
)
def test_bad_arguments_of_a_backward(bad: Any) -> None:
    assert_refused(squared_relu8_backward, GOOD_BACKWARD, bad)


@bad_calls(
    [
        ({"x8": torch.ones(2, 8)}, TypeError, "x8 must be float8_e4m3fn or float8_e5m2, got float32"),
        ({"x8": torch.ones(8).to(E4M3)}, ValueError, "x8 must be (..., T, D), got (8,)"),
        ({"x8": torch.ones(1, 1, 2, 8).to(E4M3)}, ValueError, "x8 must be (T, D) or (E, T, D), got (1, 1, 2, 8)"),
    ]
)
def test_bad_arguments_of_a_transpose(bad: Any) -> None:
    assert_refused(transpose8, {"x8": torch.ones(2, 8).to(E4M3)}, bad)


@bad_calls(
    [
        (
            {"w": torch.ones(2, 8).to(E4M3)},
            TypeError,
            "w must be float16 or bfloat16 or float32 or float64, got float8_e4m3fn",
        ),
        ({"w": torch.ones(1, 1, 2, 8)}, ValueError, "w must be (R, C) or (E, R, C), got (1, 1, 2, 8)"),
    ]
)
def test_bad_weights(bad: Any) -> None:
    assert_refused(quantize_weight8, {"w": torch.ones(2, 8)}, bad)


def test_checked_mode() -> None:
    with checked_mode(), pytest.raises(ValueError, match=r"^quantize8: x must be finite, got 16 non-finite values$"):
        quantize8(torch.full((2, 8), torch.inf), scalar(1.0), scalar(0.0))
    bad = GOOD_BACKWARD | {"a8": torch.full((2, 8), torch.nan).to(E4M3)}
    with checked_mode(), pytest.raises(ValueError, match=r"^squared_relu8_backward: a8 must be finite, got 16 non-fin"):
        squared_relu8_backward(**bad)
