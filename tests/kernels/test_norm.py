"""`rms_norm` and `gated_rms_norm`: against their definitions, float64, and autograd."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import assert_equal_to_float64
from support import assert_refused, assert_rule, backends, bad_calls, checked_mode, device_of, outputs_and_gradients
from torch.nn import functional as F

from yaongi.kernels import gated_rms_norm, rms_norm

SHAPES = [(3, 4, 8), (5, 6), (7,), (0, 6), (2, 1), (1, 1, 2, 4)]


def norm_arguments(
    shape: tuple[int, ...], residual: bool, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> dict[str, Any]:
    """Return arguments of one `rms_norm`; x is a slice."""
    made = {"weight": torch.randn(shape[-1])} | ({"residual": 2 * torch.randn(shape)} if residual else {})
    tensors = {name: t.to(device, dtype) for name, t in made.items()}
    return {"x": sliced(shape, dtype, device), **tensors, "eps": 1e-3}


def gated_arguments(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> dict[str, Any]:
    """Return arguments of one `gated_rms_norm`; z is a slice."""
    x, weight = (torch.randn(size).to(device, dtype) for size in (shape, shape[-1:]))
    return {"x": x, "z": sliced(shape, dtype, device), "weight": weight, "eps": 1e-3, "groups": groups}


def sliced(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Return a slice of a wider tensor."""
    return torch.randn(*shape[:-1], shape[-1] + 16).to(device, dtype)[..., 8:-8]


def differentiable(args: dict[str, Any]) -> list[str]:
    """Return the names of a call's arguments that get a gradient."""
    return [name for name, value in args.items() if isinstance(value, torch.Tensor)]


def norm_definition(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute torch's own norm; differentiable by autograd."""
    total = x if residual is None else x + residual
    y = F.rms_norm(total, weight.shape, weight, eps)
    return y if residual is None else (y, total)


def gated_definition(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, groups: int) -> torch.Tensor:
    """Compute the definition group by group; differentiable by autograd."""
    gated = (x * z * torch.sigmoid(z)).chunk(groups, dim=-1)
    return torch.cat([F.rms_norm(g, g.shape[-1:], None, eps) for g in gated], dim=-1) * weight


def assert_same(
    function: Callable[..., Any], definition: Callable[..., Any], args: dict[str, Any], relative: float = 1e-12
) -> None:
    """Assert equal outputs and gradients in float64."""
    results, expected = (outputs_and_gradients(f, args, differentiable(args)) for f in (function, definition))
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert_equal_to_float64(results[name], value, relative, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_norm_equals_its_definition(shape: tuple[int, ...], residual: bool) -> None:
    assert_same(rms_norm, norm_definition, norm_arguments(shape, residual))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, "D"])
def test_gated_norm_equals_its_definition(shape: tuple[int, ...], groups: int | str) -> None:
    groups = shape[-1] if groups == "D" else groups
    if shape[-1] % groups:
        groups = 1
    assert_same(gated_rms_norm, gated_definition, gated_arguments(shape, groups))


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


@pytest.mark.parametrize("backend", backends("triton"))
@DTYPES
@pytest.mark.parametrize("shape", [(6, 50, 96), (33, 2048), (1, 7), (0, 64)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_norm_float64_rule(residual: bool, shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    args = norm_arguments(shape, residual, dtype, device_of(backend, "rms_norm"))
    assert_rule(lambda a: outputs_and_gradients(rms_norm, a, differentiable(a)), args, backend)


@pytest.mark.parametrize("backend", backends("triton"))
@DTYPES
@pytest.mark.parametrize(("shape", "groups"), [((6, 50, 96), 3), ((33, 4096), 8), ((1, 7), 7), ((0, 64), 2)], ids=str)
def test_gated_norm_float64_rule(shape: tuple[int, ...], groups: int, dtype: torch.dtype, backend: str) -> None:
    args = gated_arguments(shape, groups, dtype, device_of(backend, "gated_rms_norm"))
    assert_rule(lambda a: outputs_and_gradients(gated_rms_norm, a, differentiable(a)), args, backend)


@pytest.mark.parametrize("backend", backends("triton"))
def test_norm_of_mixed_dtypes(backend: str) -> None:
    """A bfloat16 branch joins a float32 residual stream under a float32 weight."""
    args = norm_arguments((5, 64), True, torch.float32, device_of(backend, "rms_norm"))
    args["x"] = args["x"].bfloat16()
    y, total = rms_norm(**args)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert_rule(lambda a: outputs_and_gradients(rms_norm, a, differentiable(a)), args, backend)


@pytest.mark.parametrize("backend", backends("triton"))
def test_the_rounded_sum_is_what_is_normalised(backend: str) -> None:
    args = norm_arguments((5, 64), True, torch.bfloat16, device_of(backend, "rms_norm"))
    y, total = rms_norm(**args)
    assert torch.equal(total, args["x"] + args["residual"])
    assert torch.equal(y, rms_norm(total, args["weight"], args["eps"]))


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_through_one_output(output: int) -> None:
    args = norm_arguments((3, 6), True)
    for name in differentiable(args):
        args[name] = args[name].detach().requires_grad_()
    inputs = [args[name] for name in differentiable(args)]
    gradients = [
        torch.autograd.grad(f(**args)[output].square().sum(), inputs, allow_unused=True)
        for f in (rms_norm, norm_definition)
    ]
    for got, expected in zip(*gradients, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", backends("triton"))
def test_any_leading_strides(backend: str) -> None:
    device = device_of(backend, "rms_norm")
    x, z, weight = (torch.randn(shape, device=device) for shape in ((4, 3, 8), (4, 3, 8), (8,)))
    swapped = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, z)]
    for function in (lambda x, z: gated_rms_norm(x, z, weight, 1e-5, 2), lambda x, z: rms_norm(x, weight, 1e-5, z)[0]):
        assert torch.equal(function(*swapped), function(x, z))
        assert function(*swapped).is_contiguous()


@pytest.mark.parametrize("backend", backends("triton"))
def test_rows_of_zeros_and_huge_rows_stay_finite(backend: str) -> None:
    x = torch.tensor([0.0, 1e-30, 1e15, 3e4], device=device_of(backend, "rms_norm"))[:, None].repeat(1, 8)
    args = {"x": x, "weight": torch.ones_like(x[0]), "eps": 1e-5}
    gated = args | {"z": x.clone(), "groups": 2}
    for function, arguments in ((rms_norm, args), (gated_rms_norm, gated)):
        for name, value in outputs_and_gradients(function, arguments, differentiable(arguments)).items():
            assert value.isfinite().all(), (function.__name__, name)


def test_gradcheck() -> None:
    x, z = (torch.randn(2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, 1e-3, r), (x, weight, z))
    assert torch.autograd.gradcheck(lambda x, z, w: gated_rms_norm(x, z, w, 1e-3, 3), (x, z, weight))


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (rms_norm, norm_arguments((3, 8), True, torch.float32)),
        (gated_rms_norm, gated_arguments((3, 8), 2, torch.float32)),
    ],
)
def test_gradients_of_any_subset(function: Callable[..., Any], args: dict[str, Any]) -> None:
    everything = outputs_and_gradients(function, args, differentiable(args))
    for count in range(3):
        for wanted in itertools.combinations(differentiable(args), count):
            for name, value in outputs_and_gradients(function, args, wanted).items():
                assert torch.equal(value, everything[name]), name


def test_a_second_derivative_is_refused() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    for y in (rms_norm(x, weight), gated_rms_norm(x, x.detach(), weight)):
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="rms_norm_backward: there is no derivative of this op"):
            dx.sum().backward()


def test_opcheck() -> None:
    ops, x, weight = torch.ops.yaongi, sliced((2, 3, 8)).requires_grad_(), torch.randn(8, requires_grad=True)
    z = torch.randn(2, 3, 8, requires_grad=True)
    torch.library.opcheck(ops.rms_norm.default, (x, weight, None, 1e-5))
    torch.library.opcheck(ops.rms_norm.default, (x, weight, z, 1e-5))
    torch.library.opcheck(ops.gated_rms_norm.default, (x, z, weight, 1e-5, 2))
    x, z, weight = x.detach(), z.detach(), weight.detach()
    torch.library.opcheck(ops.rms_norm_backward.default, (z, None, x, weight, 1e-5))
    torch.library.opcheck(ops.rms_norm_backward.default, (z, z, x, weight, 1e-5))
    torch.library.opcheck(ops.gated_rms_norm_backward.default, (z, x, z, weight, 1e-5, 2))


def both(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Apply the two norms one after the other."""
    y, total = rms_norm(x, weight, 1e-5, residual)
    return gated_rms_norm(y, total, weight, 1e-5, 2)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str) -> None:
    args = {"x": torch.randn(2, 3, 8), "residual": torch.randn(2, 3, 8), "weight": torch.randn(8)}
    expected = outputs_and_gradients(both, args, args)
    compiled = torch.compile(both, fullgraph=True, backend=compiler)
    for name, value in outputs_and_gradients(compiled, args, args).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@settings(max_examples=30, deadline=None)
@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    group=st.integers(1, 5),
    groups=st.integers(1, 4),
    residual=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(leading=[], group=1, groups=1, residual=True, seed=5)
def test_any_shape(leading: list[int], group: int, groups: int, residual: bool, seed: int) -> None:
    torch.manual_seed(seed)
    shape = (*leading, group * groups)
    relative = 1e-10 if group == 1 else 1e-12  # with one channel, dx is a difference of nearly equal terms
    assert_same(rms_norm, norm_definition, norm_arguments(shape, residual), relative)
    assert_same(gated_rms_norm, gated_definition, gated_arguments(shape, groups), relative)


GOOD = norm_arguments((2, 3, 8), True, torch.float32)
GOOD_GATED = gated_arguments((2, 3, 8), 4, torch.float32)
FLOATS = "must be float16 or bfloat16 or float32 or float64, got"
TENSOR = "must be a tensor, got"
ON_META = "must be on cpu like the first tensor, got meta"


@pytest.mark.parametrize(
    ("function", "good", "name"),
    [(rms_norm, GOOD, n) for n in ("x", "weight", "residual")]
    + [(gated_rms_norm, GOOD_GATED, n) for n in ("x", "z", "weight")],
)
def test_checked_mode(function: Callable[..., Any], good: dict[str, Any], name: str) -> None:
    bad = {name: torch.full(good[name].shape, torch.nan)}
    with checked_mode():
        function(**good)
        with pytest.raises(
            ValueError, match=rf"^{function.__name__}: {name} must be finite, got \d+ non-finite values$"
        ):
            function(**good | bad)
    function(**good | bad)


def bad_eps() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    yield {"eps": "small"}, TypeError, "eps must be a number, got str"
    yield {"eps": None}, TypeError, "eps must be a number, got NoneType"
    yield {"eps": True}, TypeError, "eps must be a number, got bool"
    yield {"eps": torch.tensor(1e-5)}, TypeError, "eps must be a number, got Tensor"
    yield {"eps": float("nan")}, ValueError, "eps must be finite, got nan"
    yield {"eps": float("inf")}, ValueError, "eps must be finite, got inf"
    yield {"eps": 0.0}, ValueError, "eps must be positive, got 0.0"
    yield {"eps": -1e-5}, ValueError, "eps must be positive, got -1e-05"


def bad_x_and_weight() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    ones, meta = torch.ones, torch.device("meta")
    yield {"x": None}, TypeError, f"x {TENSOR} NoneType"
    yield {"x": 1.0}, TypeError, f"x {TENSOR} float"
    yield {"x": ones(2, 3, 8).int()}, TypeError, f"x {FLOATS} int32"
    yield {"x": ones(())}, ValueError, "x must be (..., D), got ()"
    yield {"x": ones(2, 8, 3).mT}, ValueError, "x must have stride 1 along D, got strides (24, 1, 3)"
    yield {"weight": 1.0}, TypeError, f"weight {TENSOR} float"
    yield {"weight": ones(8).bool()}, TypeError, f"weight {FLOATS} bool"
    yield {"weight": ones(7)}, ValueError, "weight must be (D) = (8), got (7,)"
    yield {"weight": ones(1, 8)}, ValueError, "weight must be (D) = (8), got (1, 8)"
    yield {"weight": ones(())}, ValueError, "weight must be (D) = (8), got ()"
    yield {"weight": ones(8, device=meta)}, TypeError, f"weight {ON_META}"


def bad_arguments() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    """Yield changes of GOOD that make a bad call."""
    ones, meta = torch.ones, torch.device("meta")
    yield from bad_x_and_weight()
    yield from bad_eps()
    yield {"x": ones(2, 3, 9)}, ValueError, "weight must be (D) = (9), got (8,)"
    yield {"x": ones(2, 3, 8, device=meta)}, TypeError, "weight must be on meta like the first tensor, got cpu"
    yield {"residual": 0}, TypeError, f"residual {TENSOR} int"
    yield {"residual": ones(2, 3, 8).long()}, TypeError, f"residual {FLOATS} int64"
    yield {"residual": ones(2, 3, 7)}, ValueError, "residual must be (..., D) = (..., 8), got (2, 3, 7)"
    yield {"residual": ones(8)}, ValueError, "residual must be (2, 3, 8) like x, got (8,)"
    yield {"residual": ones(3, 2, 8)}, ValueError, "residual must be (2, 3, 8) like x, got (3, 2, 8)"
    yield {"residual": ones(2, 8, 3).mT}, ValueError, "residual must have stride 1 along D, got strides (24, 1, 3)"
    yield {"residual": ones(2, 3, 8, device=meta)}, TypeError, f"residual {ON_META}"


@bad_calls(bad_arguments())
def test_bad_arguments(bad: Any) -> None:
    assert_refused(rms_norm, GOOD, bad)


def bad_gated_arguments() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    """Yield changes of GOOD_GATED that make a bad call."""
    ones, meta = torch.ones, torch.device("meta")
    yield from bad_x_and_weight()
    yield from bad_eps()
    yield {"x": ones(2, 3, 8).half()}, TypeError, "z must be float16, got float32"
    yield {"x": ones(2, 3, 9)}, ValueError, "z must be (..., D) = (..., 9), got (2, 3, 8)"
    yield {"x": ones(2, 3, 8, device=meta)}, TypeError, "z must be on meta like the first tensor, got cpu"
    yield {"z": None}, TypeError, f"z {TENSOR} NoneType"
    yield {"z": ones(2, 3, 8).double()}, TypeError, "z must be float32, got float64"
    yield {"z": ones(2, 3, 4)}, ValueError, "z must be (..., D) = (..., 8), got (2, 3, 4)"
    yield {"z": ones(3, 8)}, ValueError, "z must be (2, 3, 8) like x, got (3, 8)"
    yield {"z": ones(2, 8, 3).mT}, ValueError, "z must have stride 1 along D, got strides (24, 1, 3)"
    yield {"z": ones(2, 3, 8, device=meta)}, TypeError, f"z {ON_META}"
    yield {"groups": 2.0}, TypeError, "groups must be an int, got float"
    yield {"groups": None}, TypeError, "groups must be an int, got NoneType"
    yield {"groups": 0}, ValueError, "groups must be 1 or more, got 0"
    yield {"groups": 3}, ValueError, "groups must be a divisor of D = 8, got 3"


@bad_calls(bad_gated_arguments())
def test_bad_gated_arguments(bad: Any) -> None:
    assert_refused(gated_rms_norm, GOOD_GATED, bad)
