"""`mamba_step`: it continues a prefix, with any dtype of the state, and records no graph."""

from typing import Any

import pytest
import torch
from mamba_support import OPTIONAL, SIZES, arguments
from oracle import assert_equal_to_float64
from support import assert_rule, backends, device_of

from yaongi.kernels import mamba_scan, mamba_step


@pytest.mark.parametrize("absent", [(), OPTIONAL])
def test_step_continues_a_prefix_exactly(absent: tuple[str, ...]) -> None:
    args = arguments(SIZES, 75, None, absent)
    whole, final_state = mamba_scan(**args)
    prefix = {name: args[name][:, :66] for name in ("x", "dt", "b", "c")}
    _, state = mamba_scan(**args | prefix)
    parameters = {name: args[name] for name in ("A", "D", "dt_bias")}
    for t in range(66, 75):
        token = {name: args[name][:, t] for name in ("x", "dt", "b", "c")}
        assert_equal_to_float64(mamba_step(state, **token, **parameters), whole[:, t], 1e-13)
    assert_equal_to_float64(state, final_state, 1e-13)


def one_step(a: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return y and the state after one step on the first token of a call's arguments."""
    token = {name: a[name][:, 0] for name in ("x", "dt", "b", "c")}
    parameters = {name: a[name] for name in ("A", "D", "dt_bias")}
    return {"y": mamba_step(a["initial_state"], **token, **parameters), "state": a["initial_state"]}


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_step_float64_rule(dtype: torch.dtype, state_dtype: torch.dtype, backend: str) -> None:
    args = arguments((3, 8, 16, 2, 32), 1, dtype=dtype, device=device_of(backend, "mamba_step"))
    args["initial_state"] = args["initial_state"].to(state_dtype)
    assert_rule(one_step, args, backend)


def test_step_keeps_no_graph() -> None:
    args = arguments(SIZES, 1)
    args["D"].requires_grad_()
    results = one_step(args)
    assert not results["y"].requires_grad
    assert not results["state"].requires_grad


def test_compiled_step() -> None:
    args = arguments(SIZES, 1, dtype=torch.float32)
    copy = args | {"initial_state": args["initial_state"].clone()}
    expected = one_step(copy)
    for name, value in torch.compile(one_step, fullgraph=True, backend="aot_eager")(args).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    torch.testing.assert_close(args["initial_state"], copy["initial_state"])
