"""`linear_step` and `linear_steps`: the products of few rows with one weight, or with several."""

from typing import Any

import pytest
import torch
from oracle import assert_equal_to_float64
from support import assert_refused, assert_rule, backends, bad_calls, checked_mode, device_of

from yaongi.kernels import linear_step, linear_steps, use_backend

Tensor = torch.Tensor


def arguments(
    T: int, D: int, N: int, addend: bool, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> dict[str, Any]:
    """Return arguments of one call, with results of a usual size."""
    made = {"x": torch.randn(T, D), "weight": torch.randn(N, D) / max(D, 1) ** 0.5}
    made |= {"addend": torch.randn(T, N)} if addend else {}
    return {name: t.to(device, dtype) for name, t in made.items()}


@pytest.mark.parametrize("addend", [False, True])
@pytest.mark.parametrize("shape", [(3, 7, 5), (0, 4, 3), (2, 0, 3), (1, 4, 0)], ids=str)
def test_equals_its_definition(shape: tuple[int, int, int], addend: bool) -> None:
    args = arguments(*shape, addend)
    wanted = torch.einsum("td,nd->tn", args["x"], args["weight"]) + args.get("addend", 0)
    assert_equal_to_float64(linear_step(**args), wanted, 1e-13)
    wanted = torch.einsum("td,nd->tn", args["x"], args["weight"]).relu() ** 2 + args.get("addend", 0)
    assert_equal_to_float64(linear_step(**args, activation="squared_relu"), wanted, 1e-13)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("addend", [False, True])
@pytest.mark.parametrize("shape", [(1, 2048, 10304), (16, 512, 64), (5, 272, 40), (8, 96, 17000), (2, 24, 7)], ids=str)
def test_follows_the_rule(shape: tuple[int, int, int], addend: bool, dtype: torch.dtype, backend: str) -> None:
    args = arguments(*shape, addend, dtype, device_of(backend, "linear_step"))
    assert_rule(lambda a: {"y": linear_step(**a)}, args, backend)
    assert_rule(lambda a: {"y": linear_step(**a, activation="squared_relu")}, args, backend)
    with use_backend(backend):  # type: ignore[arg-type]
        wide = linear_step(args["x"], args["weight"], wide=True)
    # Tensor cores cut bits off as they add; cut at every 16 elements, 2,048 err by 4e-6 (float32 sums by 5e-7).
    assert_equal_to_float64(wide, args["x"].double() @ args["weight"].double().T, 1.5e-5)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("widths", [(2048, 512, 512), (40, 7), (1, 300, 1, 9), (0, 5), (3,), ()], ids=str)
@pytest.mark.parametrize("T", [0, 1, 2])
def test_several_weights(T: int, widths: tuple[int, ...], backend: str) -> None:
    """Each product follows the rule; of more rows than one it has the bits that it has without the others."""
    device = device_of(backend, "linear_steps")
    x = torch.randn(T, 272).to(device, torch.bfloat16)
    weights = [(torch.randn(width, 272) / 16).to(x) for width in widths]
    args = {"x": x, "weights": weights}
    assert_rule(lambda a: dict(zip(map(str, range(len(widths))), linear_steps(**a), strict=True)), args, backend)
    with use_backend(backend):  # type: ignore[arg-type]
        for y, weight in zip(linear_steps(x, weights, settled=True), weights, strict=True):
            assert y.is_contiguous()
            assert y.shape == (T, len(weight))
            assert T == 1 or torch.equal(y, linear_step(x, weight))


@pytest.mark.parametrize("backend", backends("triton"))
def test_a_row_does_not_depend_on_the_others(backend: str) -> None:
    """Nor, by the kernel, on their number from two on; one alone is summed in another order."""
    args = arguments(16, 512, 64, False, torch.bfloat16, device_of(backend, "linear_step"))
    with use_backend(backend):  # type: ignore[arg-type]
        together = linear_step(**args)
        pairs = torch.cat([linear_step(rows, args["weight"]) for rows in args["x"].split(2)])
        args["x"][3] = torch.nan
        beside = linear_step(**args)
    if backend == "triton":
        assert torch.equal(pairs, together)
    assert beside[3].isnan().all()
    beside[3] = together[3]
    assert torch.equal(beside, together)


@pytest.mark.gpu
def test_a_settled_weight_gives_the_same_bits() -> None:
    """In a recorded chain, too, whose products begin before the ones ahead have ended."""
    args = arguments(1, 1024, 1024, False, torch.bfloat16, "cuda")
    wanted = x = args["x"]
    for _ in range(20):
        wanted = linear_step(wanted, args["weight"])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            x = linear_step(x, args["weight"], settled=True)
    for _ in range(3):
        graph.replay()
        assert torch.equal(x, wanted)


def test_wide_results_are_not_rounded() -> None:
    args = arguments(3, 64, 5, False, torch.bfloat16)
    y = linear_step(**args, wide=True)
    assert y.dtype == torch.float32
    assert torch.equal(y, args["x"].float() @ args["weight"].float().T)


def test_opcheck_and_no_gradient() -> None:
    args = arguments(3, 8, 5, True, torch.float32)
    torch.library.opcheck(torch.ops.yaongi.linear_step.default, (*args.values(), "squared_relu", False, True))
    assert not linear_step(**{name: t.requires_grad_() for name, t in args.items()}).requires_grad
    x, *weights = (t.detach() for t in args.values())
    torch.library.opcheck(torch.ops.yaongi.linear_steps.default, (x, weights[:1] * 2, True))
    assert not linear_steps(args["x"], [args["weight"]])[0].requires_grad


@bad_calls(
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(3)}, ValueError, "x must be (T, D), got (3,)"),
        ({"weight": torch.ones(5, 9)}, ValueError, "weight must be (N, D) = (N, 8), got (5, 9)"),
        ({"weight": torch.ones(5, 8).half()}, TypeError, "weight must be float32, got float16"),
        ({"addend": torch.ones(3, 6)}, ValueError, "addend must be (T, N) = (3, 5), got (3, 6)"),
        ({"activation": "relu"}, ValueError, "activation must be 'squared_relu' or None, got 'relu'"),
        ({"wide": 1}, TypeError, "wide must be a bool, got int"),
        ({"settled": 0}, TypeError, "settled must be a bool, got int"),
    ]
)
def test_bad_arguments(bad: Any) -> None:
    good = {"x": torch.ones(3, 8), "weight": torch.ones(5, 8), "addend": torch.ones(3, 5), "wide": False}
    assert_refused(linear_step, good, bad)


@bad_calls(
    [
        ({"x": torch.ones(3)}, ValueError, "x must be (T, D), got (3,)"),
        ({"weights": torch.ones(5, 8)}, TypeError, "weights must be a list of tensors, got Tensor"),
        ({"weights": [None]}, TypeError, "weights[0] must be a tensor, got NoneType"),
        (
            {"weights": [torch.ones(5, 8), torch.ones(5, 9)]},
            ValueError,
            "weights[1] must be (N1, D) = (N1, 8), got (5, 9)",
        ),
        ({"weights": [torch.ones(5, 8).half()]}, TypeError, "weights[0] must be float32, got float16"),
        ({"settled": 0}, TypeError, "settled must be a bool, got int"),
    ]
)
def test_bad_arguments_of_several_weights(bad: Any) -> None:
    assert_refused(linear_steps, {"x": torch.ones(3, 8), "weights": [torch.ones(5, 8), torch.ones(4, 8)]}, bad)


def test_checked_mode() -> None:
    with checked_mode(), pytest.raises(ValueError, match=r"^linear_step: x must be finite, got 1 non-finite values$"):
        linear_step(torch.tensor([[torch.inf, 1.0]]), torch.ones(2, 2))
    with (
        checked_mode(),
        pytest.raises(ValueError, match=r"^linear_steps: weights\[1\] must be finite, got 4 non-finite"),
    ):
        linear_steps(torch.ones(1, 2), [torch.ones(3, 2), torch.full((2, 2), torch.nan)])
