"""Every op's reference gives the same results and gradients on a GPU as on the CPU, in float32 and float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import assert_equal_to_float64
from support import Results, converted, document_ids, outputs_and_gradients

import yaongi.kernels
from yaongi.kernels import use_backend
from yaongi.kernels.backend import OPS

Tensor = torch.Tensor
Case = tuple[dict[str, Any], tuple[str, ...]]  # the arguments of a call in float64, and those that get a gradient
IN_PLACE = {"causal_conv1d_step": ("state",), "mamba_step": ("state",), "teon_update": ("params", "momenta", "masters")}
RELATIVE = {torch.float64: 1e-12, torch.float32: 3e-5}  # of the largest value; the order of sums differs


@pytest.fixture(autouse=True)
def without_tf32() -> Iterator[None]:
    """Compute float32 products without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scan_arguments(B: int, L: int, H: int, P: int, G: int, N: int) -> dict[str, Any]:
    """Return the arguments that `mamba_scan` and, for one token, `mamba_step` share."""
    return {
        "x": randn(B, L, H, P),
        "dt": randn(B, L, H),
        "A": -randn(H).exp(),
        "b": randn(B, L, G, N),
        "c": randn(B, L, G, N),
        "D": randn(H),
        "dt_bias": randn(H) - 1,
    }


def one_token(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a step: those of a scan without the sequence dimension."""
    return {name: value[:, 0] if name in ("x", "dt", "b", "c") else value for name, value in arguments.items()}


def cases() -> dict[str, Case]:
    """Return one call of every public op with all its optional tensors."""
    scan = scan_arguments(2, 300, 4, 16, 2, 24)
    conv = {"x": randn(2, 90, 48), "weight": randn(48, 4), "bias": randn(48)}
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(70)]).int()
    matrices = {name: [randn(24, 40) for _ in range(4)] for name in ("params", "grads", "momenta", "masters")}
    return {
        "causal_conv1d": (
            conv | {"document_ids": document_ids(2, (30, 1, 59)), "initial_state": randn(2, 48, 3)},
            ("x", "weight", "bias", "initial_state"),
        ),
        "causal_conv1d_step": (conv | {"x": randn(2, 48), "state": randn(2, 48, 3)}, ()),
        "mamba_scan": (
            scan
            | {
                "document_ids": document_ids(2, (70, 1, 229)),
                "initial_state": randn(2, 4, 16, 24),
                "return_final_state": True,
            },
            ("x", "dt", "A", "b", "c", "D", "dt_bias", "initial_state"),
        ),
        "cross_entropy": ({"logits": randn(70, 50), "targets": torch.arange(-20, 50)}, ("logits",)),
        "mamba_core": (
            {
                "projected": randn(2, 90, 64 + 160 + 4),
                "taps": randn(160, 4),
                "taps_bias": randn(160),
                "weight": randn(64),
                "groups": 2,
                "eps": 1e-3,
                "document_ids": document_ids(2, (30, 1, 59)),
            }
            | {name: scan[name] for name in ("A", "D", "dt_bias")},
            ("projected", "taps", "taps_bias", "A", "D", "dt_bias", "weight"),
        ),
        "mamba_step": (one_token(scan) | {"state": randn(2, 4, 16, 24)}, ()),
        "moe_route": ({"logits": randn(70, 8), "bias": randn(8), "top_k": 3, "scale": 2.5}, ("logits",)),
        "moe": (
            {
                "x": randn(70, 32),
                "w_up": randn(8, 48, 32),
                "w_down": randn(8, 32, 48),
                "expert_ids": ids,
                "expert_weights": randn(70, 3),
            },
            ("x", "w_up", "w_down", "expert_weights"),
        ),
        "rms_norm": (
            {"x": randn(5, 7, 96), "weight": randn(96), "residual": randn(5, 7, 96)},
            ("x", "weight", "residual"),
        ),
        "gated_rms_norm": (
            {"x": randn(5, 7, 96), "z": randn(5, 7, 96), "weight": randn(96), "groups": 4},
            ("x", "z", "weight"),
        ),
        "symmetric_product": ({"x": randn(3, 20, 36), "c": randn(3, 20, 20), "alpha": 0.5, "beta": 2.0}, ("x", "c")),
        "newton_schulz": ({"x": randn(3, 24, 40)}, ()),
        "teon_update": (matrices | {"stack": 2, "lr": 0.1, "weight_decay": 0.1}, ()),
    }


def moved(arguments: Any, device: str, dtype: torch.dtype) -> Any:
    """Return the call's arguments on a device, with floats in a dtype and integers unchanged."""
    floats = converted(arguments, lambda t: t.to(device, dtype, copy=True))
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in floats.items()}


def run(op: str, arguments: dict[str, Any], wanted: tuple[str, ...]) -> Results:
    """Return all that a call returns, changes or gives as a gradient."""
    function: Callable[..., Any] = getattr(yaongi.kernels, op)
    if op in IN_PLACE:
        returned = function(**arguments)
        results = {"output": returned} if isinstance(returned, torch.Tensor) else {}
        for name in IN_PLACE[op]:
            value = arguments[name]
            results |= {f"{name} {i}": t for i, t in enumerate(value)} if isinstance(value, list) else {name: value}
        return results
    return outputs_and_gradients(function, arguments, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("op", cases())
def test_reference_on_a_gpu_equals_the_cpu(op: str, dtype: torch.dtype) -> None:
    arguments, wanted = cases()[op]
    with use_backend("reference"):
        expected = run(op, moved(arguments, "cpu", dtype), wanted)
        results = run(op, moved(arguments, "cuda", dtype), wanted)
    for name, result in results.items():
        assert result.is_cuda, name
        assert_equal_to_float64(result.cpu(), expected[name], RELATIVE[dtype], name)


def test_every_public_op_is_compared() -> None:
    public = {name for name in yaongi.kernels.__all__ if name in OPS}
    assert public - {"cross_entropy_backward"} == set(cases())  # covered as the gradient of cross_entropy
