"""`cross_entropy`: against torch's own, float64, and autograd."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_equal_to_float64
from support import assert_refused, assert_rule, backends, bad_calls, checked_mode, device_of, outputs_and_gradients
from torch.nn import functional as F

from yaongi.kernels import cross_entropy, use_backend

SHAPES = [(5, 9), (1, 1), (0, 4), (33, 130)]


def arguments(shape: tuple[int, int], dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Any]:
    """Return arguments of one call: logits in a wider tensor, and targets, some missing."""
    T, V = shape
    logits = (4 * torch.randn(T, V + 8)).to(device, dtype)[:, :V]
    return {"logits": logits, "targets": torch.randint(-2, V, (T,)).to(device)}


def definition(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute torch's own; differentiable by autograd."""
    losses = F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="none")
    return losses, logits.logsumexp(-1)


def results(args: dict[str, Any]) -> dict[str, torch.Tensor]:
    return outputs_and_gradients(cross_entropy, args, ["logits"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torchs(shape: tuple[int, int]) -> None:
    args = arguments(shape)
    for name, value in outputs_and_gradients(definition, args, ["logits"]).items():
        assert_equal_to_float64(results(args)[name], value, 1e-12, name)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (70, 32768), (9, 100_003)], ids=str)
def test_float64_rule(shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    assert_rule(results, arguments(shape, dtype, device_of(backend, "cross_entropy")), backend)


@pytest.mark.parametrize("backend", backends("triton"))
def test_extremes(backend: str) -> None:
    """Logits of 1e4 don't overflow, −∞ adds nothing, and a NaN or a target beyond V affects its own row alone."""
    device = device_of(backend, "cross_entropy")
    logits = torch.randn(5, 5000, device=device)
    logits[0] *= 1e4
    logits[1, :4500] = -torch.inf
    logits[2, 7] = torch.nan
    targets = torch.tensor([3, 4999, 8, 0, 9], device=device, dtype=torch.int32)
    if device == "cuda":
        targets[4] = 5000
    with use_backend(backend):
        losses, normalizers = cross_entropy(logits, targets)
    wanted = definition(logits[[0, 1, 3]].double(), targets[[0, 1, 3]].long())
    for ours, exact in zip((losses, normalizers), wanted, strict=True):
        torch.testing.assert_close(ours[[0, 1, 3]].double(), exact, rtol=1e-6, atol=1e-5)
    assert losses[2].isnan()
    assert losses[4].isnan() == (device == "cuda")


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    logits = torch.randn(1, 32768, device="cuda", dtype=torch.bfloat16).expand(70_000, -1).contiguous()
    targets = torch.full((70_000,), 5, device="cuda")
    leaf = logits.requires_grad_()
    losses, _ = cross_entropy(leaf, targets)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert (losses == losses[0]).all()
    assert torch.equal(gradient[-1], gradient[0])


@given(T=st.integers(0, 9), V=st.integers(1, 40), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_any_shape(T: int, V: int, seed: int) -> None:
    torch.manual_seed(seed)
    args = arguments((T, V))
    for name, value in outputs_and_gradients(definition, args, ["logits"]).items():
        assert_equal_to_float64(results(args)[name], value, 1e-12, name)


def test_gradcheck() -> None:
    args = arguments((4, 6))
    assert torch.autograd.gradcheck(cross_entropy, (args["logits"].requires_grad_(), args["targets"]))


def test_opcheck() -> None:
    args = arguments((4, 6), torch.float32)
    torch.library.opcheck(torch.ops.yaongi.cross_entropy.default, (args["logits"].requires_grad_(), args["targets"]))


@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_compile(compiler: str) -> None:
    args = arguments((4, 6))
    compiled = torch.compile(cross_entropy, fullgraph=True, backend=compiler)
    for ours, wanted in zip(compiled(**args), cross_entropy(**args), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.tensor([0, 3])}, "targets must be below 3 (V), got 3"),
        ({"logits": torch.tensor([[0.0, torch.inf, 1.0]] * 2)}, "logits must be finite, got 2 non-finite values"),
    ],
)
def test_checked_mode(changes: dict[str, Any], message: str) -> None:
    with checked_mode(), pytest.raises(ValueError, match=re.escape(f"cross_entropy: {message}")):
        cross_entropy(**({"logits": torch.zeros(2, 3), "targets": torch.tensor([0, 1])} | changes))


@bad_calls(
    [
        ({"logits": [[0.0]]}, TypeError, "logits must be a tensor, got list"),
        (
            {"logits": torch.zeros(2, 3, dtype=torch.int64)},
            TypeError,
            "logits must be float16 or bfloat16 or float32 or float64, got int64",
        ),
        ({"logits": torch.zeros(3)}, ValueError, "logits must be (T, V), got (3,)"),
        ({"logits": torch.zeros(3, 2).T}, ValueError, "logits must have stride 1 along V, got strides (1, 2)"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits must be (T, V) with V of 1 or more, got (2, 0)"),
        ({"targets": [0, 1]}, TypeError, "targets must be a tensor, got list"),
        ({"targets": torch.zeros(2)}, TypeError, "targets must be int32 or int64, got float32"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, "targets must be (T) = (2), got (3,)"),
        (
            {"targets": torch.zeros(2, dtype=torch.int64, device="meta")},
            TypeError,
            "targets must be on cpu like the first tensor, got meta",
        ),
    ]
)
def test_bad_arguments(bad: Any) -> None:
    assert_refused(cross_entropy, {"logits": torch.zeros(2, 3), "targets": torch.tensor([0, 1])}, bad)
