"""`rms_norm8`: its definition by `rms_norm` and a cast, its gradients by autograd, and kernels against emulation."""

from typing import Any

import pytest
import torch
from oracle import assert_close, assert_codes_close, assert_equal_to_float64
from support import assert_refused, backends, bad_calls, checked_mode, device_of

from yaongi.kernels import quantize8, rms_norm, rms_norm8, rms_norm8_backward, use_backend

Tensor = torch.Tensor


def scalar(value: float, device: str = "cpu") -> Tensor:
    return torch.tensor(value, device=device)


@pytest.mark.parametrize("shape", [(5, 48), (16, 7), (0, 6), (3, 1)], ids=str)
def test_it_is_rms_norm_and_a_cast(shape: tuple[int, int]) -> None:
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[1], dtype=torch.float64)
    amax, wanted = scalar(0.25), scalar(0.25)
    y8, y, inverse_rms = rms_norm8(x, weight, 1e-3, scalar(16.0), amax, wide=True)
    expected = rms_norm(x, weight, 1e-3)
    assert_equal_to_float64(y, expected, 1e-13)
    assert_equal_to_float64(inverse_rms, (x.square().mean(-1) + 1e-3).rsqrt(), 1e-13)
    assert torch.equal(y8.double(), quantize8(expected, scalar(16.0), wanted)[0].double())
    assert amax == wanted
    assert rms_norm8(x, weight, 1e-3, scalar(16.0), amax)[1].numel() == 0


@pytest.mark.parametrize("extra", [False, True])
def test_its_gradients_are_those_of_autograd(extra: bool) -> None:
    x, dy, more = (torch.randn(16, 48, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(48, dtype=torch.float64)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    dx, dweight = torch.autograd.grad(rms_norm(*leaves, 1e-3), leaves, dy)
    dx = dx + more if extra else dx
    y8, _, inverse_rms = rms_norm8(x, weight, 1e-3, scalar(16.0), scalar(0.0))
    amax, wanted = scalar(0.0), scalar(0.0)
    scales = scalar(16.0), scalar(4.0), amax
    found = rms_norm8_backward(dy, more if extra else None, x, weight, inverse_rms, *scales)
    assert_equal_to_float64(found[0], dx, 1e-12)
    assert_equal_to_float64(found[4], dweight, 1e-12)
    d8, d8t = quantize8(dx, scalar(4.0), wanted, row=True, column=True)
    for ours, expected in zip(found[1:4], (d8, d8t, y8.mT), strict=True):
        assert torch.equal(ours.double(), expected.double())
    torch.testing.assert_close(amax, wanted, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(8192, 2048), (4096 + 16, 768), (48, 144), (16, 16384)], ids=str)
def test_kernels_equal_the_emulation(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Codes, amax, and the gradients by the house's rule; y8 transposed is the forward's to the byte; two runs."""
    T, D = shape
    x, dy, extra = (torch.randn(T, D, device="cuda", dtype=dtype) for _ in range(3))
    weight, scales = torch.randn(D, device="cuda", dtype=dtype), [scalar(v, "cuda") for v in (32.0, 8.0)]

    def run(change: Any = lambda t: t) -> dict[str, Tensor]:
        amax = torch.zeros(2, device="cuda")
        inputs = [change(t) for t in (dy, extra, x, weight)]
        y8, y, inverse_rms = rms_norm8(*inputs[2:], 1e-5, scales[0], amax[0], wide=True)
        found = rms_norm8_backward(*inputs, inverse_rms, *scales, amax[1])
        names = ("dx", "d8", "d8t", "y8t", "dweight")
        return dict(zip(names, found, strict=True)) | {"y8": y8, "y": y, "r": inverse_rms, "amax": amax}

    first, second = run(), run()
    with use_backend("reference"):
        plain, exact = run(), run(Tensor.double)
    torch.testing.assert_close(first["amax"], plain["amax"], rtol=1e-5, atol=0)
    for name in ("y", "r", "dx", "dweight"):
        assert_close(first[name], exact[name], plain[name], name)
        assert torch.equal(first[name], second[name]), name
    for name in ("y8", "d8"):
        assert_codes_close(first[name], plain[name], name)
        codes = first[name].view(torch.uint8)
        assert torch.equal(codes.mT, first[f"{name}t"].view(torch.uint8)), f"{name}t"
        assert torch.equal(codes, second[name].view(torch.uint8)), name


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_amax(value: float, backend: str) -> None:
    device = device_of(backend, "rms_norm8")
    x = torch.randn(48, 96, device=device)
    x[47, 95] = value
    amax, weight = scalar(1.0, device), torch.ones(96, device=device)
    _, _, inverse_rms = rms_norm8(x, weight, 1e-5, scalar(1.0, device), amax)
    assert amax.isnan()  # an infinity's r is 0
    one, dmax = scalar(1.0, device), scalar(1.0, device)
    rms_norm8_backward(x, None, torch.ones_like(x), weight, inverse_rms.nan_to_num(1), one, one, dmax)
    assert not dmax.isfinite()


@pytest.mark.parametrize("backend", backends("triton"))
def test_rows_of_zeros_stay_finite(backend: str) -> None:
    device = device_of(backend, "rms_norm8")
    x, amax = torch.zeros(16, 96, device=device), scalar(0.0, device)
    y8, _, _ = rms_norm8(x, torch.ones(96, device=device), 1e-5, scalar(1.0, device), amax)
    assert amax == 0
    assert not y8.half().any()


def test_opcheck() -> None:
    ops, x, weight = torch.ops.yaongi, torch.randn(16, 32), torch.randn(32)
    for wide in (False, True):
        torch.library.opcheck(ops.rms_norm8.default, (x, weight, 1e-5, scalar(2.0), scalar(0.0), wide))
    r, scales = torch.rand(16), (scalar(2.0), scalar(2.0), scalar(0.0))
    for extra in (None, x):
        torch.library.opcheck(ops.rms_norm8_backward.default, (x.clone(), extra, x, weight, r, *scales))


GOOD = {"x": torch.ones(2, 8), "weight": torch.ones(8), "eps": 1e-5, "scale": scalar(1.0), "amax": scalar(0.0)}


@bad_calls(
    [
        ({"x": torch.ones(2, 3, 8)}, ValueError, "x must be (T, D), got (2, 3, 8)"),
        ({"weight": torch.ones(7)}, ValueError, "weight must be (D) = (8), got (7,)"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"scale": torch.ones(1)}, ValueError, "scale must be (), got (1,)"),
        ({"amax": 0.0}, TypeError, "amax must be a tensor, got float"),
        ({"wide": 1}, TypeError, "wide must be a bool, got int"),
    ]
)
def test_bad_arguments(bad: Any) -> None:
    assert_refused(rms_norm8, GOOD, bad)


GOOD_BACKWARD = {
    "dy": torch.ones(2, 8),
    "extra": None,
    "x": torch.ones(2, 8),
    "weight": torch.ones(8),
    "inverse_rms": torch.ones(2),
    "scale_y": scalar(1.0),
    "scale_d": scalar(1.0),
    "amax": scalar(0.0),
}


@bad_calls(
    [
        ({"extra": torch.ones(2, 7)}, ValueError, "extra must be (T, D) = (2, 8), got (2, 7)"),
        ({"inverse_rms": torch.ones(3)}, ValueError, "inverse_rms must be (T) = (2), got (3,)"),
        ({"inverse_rms": torch.ones(2).half()}, TypeError, "inverse_rms must be float32 or float64, got float16"),
        ({"scale_d": torch.ones(2)}, ValueError, "scale_d must be (), got (2,)"),
    ]
)
def test_bad_arguments_of_the_backward(bad: Any) -> None:
    assert_refused(rms_norm8_backward, GOOD_BACKWARD, bad)


def test_checked_mode() -> None:
    with checked_mode(), pytest.raises(ValueError, match=r"^rms_norm8: x must be finite, got 16 non-finite values$"):
        rms_norm8(**GOOD | {"x": torch.full((2, 8), torch.nan)})
