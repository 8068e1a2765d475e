"""`mamba_core`: against the three ops that it combines, and autograd."""

from typing import Any

import pytest
import torch
from oracle import assert_equal_to_float64
from support import assert_refused, assert_rule, backends, bad_calls, device_of, document_ids, outputs_and_gradients

from yaongi.kernels import causal_conv1d, gated_rms_norm, mamba_core, mamba_scan

SIZES = (2, 4, 3, 2, 5)  # B, H, P, G, N
TENSORS = ("projected", "taps", "taps_bias", "A", "D", "dt_bias", "weight")


def arguments(
    sizes: tuple[int, int, int, int, int],
    lengths: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, Any]:
    """Return arguments of one call; A, D and dt_bias are float32 or wider."""
    B, H, P, G, N = sizes
    wide, channels = torch.promote_types(dtype, torch.float32), H * P + 2 * G * N
    made = {
        "projected": torch.randn(B, sum(lengths), H * P + channels + H).to(dtype),
        "taps": torch.randn(channels, 4).to(dtype),
        "taps_bias": torch.randn(channels).to(dtype),
        "A": -(2 * torch.rand(H)).exp().to(wide) / 2,
        "D": torch.randn(H).to(wide),
        "dt_bias": torch.randn(H).to(wide) - 1,
        "weight": torch.randn(H * P).to(dtype),
        "document_ids": document_ids(B, lengths) if len(lengths) > 1 else None,
    }
    return {n: None if t is None else t.to(device) for n, t in made.items()} | {"groups": G, "eps": 1e-3}


def separate(
    projected: torch.Tensor,
    taps: torch.Tensor,
    taps_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    weight: torch.Tensor,
    *,
    groups: int,
    eps: float,
    document_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the same with the three ops, joined by autograd."""
    heads, width, channels = A.shape[0], weight.shape[0], taps.shape[0]
    z, xbc, dt = projected.split([width, channels, heads], dim=-1)
    xbc = causal_conv1d(xbc, taps, taps_bias, document_ids=document_ids)
    x, b, c = xbc.split([width, (channels - width) // 2, (channels - width) // 2], dim=-1)
    b, c = (t.unflatten(-1, (groups, -1)) for t in (b, c))
    y = mamba_scan(x.unflatten(-1, (heads, -1)), dt, A, b, c, D, dt_bias, document_ids=document_ids)
    return gated_rms_norm(y.flatten(-2), z, weight, eps, groups)


@pytest.mark.parametrize("lengths", [(1,), (13,), (70, 3)], ids=str)
def test_equals_the_three_ops(lengths: tuple[int, ...]) -> None:
    args = arguments(SIZES, lengths)
    results, expected = (outputs_and_gradients(f, args, TENSORS) for f in (mamba_core, separate))
    for name, value in expected.items():
        assert_equal_to_float64(results[name], value, 1e-12, name)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float64_rule(dtype: torch.dtype, backend: str) -> None:
    args = arguments((2, 4, 16, 2, 16), (100, 1, 49), dtype, device_of(backend, "mamba_core"))
    assert_rule(lambda a: outputs_and_gradients(mamba_core, a, TENSORS), args, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 8])
def test_flagship_equals_the_three_ops_on_a_gpu(groups: int) -> None:
    """The same kernels on the same slices give the same bits."""
    args = arguments((1, 64, 64, groups, 128), (300, 212), torch.bfloat16, "cuda")
    results, expected = (outputs_and_gradients(f, args, TENSORS) for f in (mamba_core, separate))
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def test_gradients_of_any_subset() -> None:
    args = arguments(SIZES, (13,))
    everything = outputs_and_gradients(mamba_core, args, TENSORS)
    for wanted in [(), *((name,) for name in TENSORS)]:
        for name, value in outputs_and_gradients(mamba_core, args, wanted).items():
            assert torch.equal(value, everything[name]), name


def test_opcheck() -> None:
    args = arguments(SIZES, (9, 4), torch.float32)
    tensors = [args[name].requires_grad_() for name in TENSORS]
    rest = (args["document_ids"], args["groups"], args["eps"])
    torch.library.opcheck(torch.ops.yaongi.mamba_core.default, (*tensors, *rest))
    tensors = [t.detach() for t in tensors]
    y, xbc, scanned = torch.ops.yaongi.mamba_core(*tensors, *rest)
    torch.library.opcheck(torch.ops.yaongi.mamba_core_backward.default, (y, xbc, scanned, *tensors, *rest))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str) -> None:
    args = arguments(SIZES, (9, 4), torch.float32)
    expected = outputs_and_gradients(mamba_core, args, TENSORS)
    compiled = torch.compile(mamba_core, fullgraph=True, backend=compiler)
    for name, value in outputs_and_gradients(compiled, args, TENSORS).items():
        torch.testing.assert_close(value, expected[name], msg=name)


GOOD = arguments((2, 4, 3, 2, 5), (2, 4), torch.float32)  # H·P 12, C 32, columns 48


@bad_calls(
    [
        ({"projected": torch.ones(2, 6, 47)}, ValueError, "projected must be (B, L, 48), got (2, 6, 47)"),
        ({"projected": torch.ones(2, 0, 48)}, ValueError, "projected must be (B, L, in) with L >= 1, got (2, 0, 48)"),
        ({"taps": torch.ones(31, 4)}, ValueError, "taps_bias must be (C) = (31), got (32,)"),
        ({"A": -torch.ones(4).bfloat16()}, TypeError, "A must be float32 or float64, got bfloat16"),
        ({"D": torch.ones(3)}, ValueError, "D must be (H) = (4), got (3,)"),
        ({"groups": 3}, ValueError, "groups must be a divisor of H = 4, got 3"),
        ({"weight": torch.ones(13)}, ValueError, "weight must be (H·P) with H = 4, got (13,)"),
        ({"groups": 4}, ValueError, "taps must be (H·P + 2·G·N, W) with H·P = 12 and G = 4, got (32, 4)"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"document_ids": torch.ones(2, 6)}, TypeError, "document_ids must be int32, got float32"),
    ]
)
def test_bad_arguments(bad: Any) -> None:
    assert_refused(mamba_core, GOOD, bad)
