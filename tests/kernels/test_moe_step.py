"""`moe_step`: routed and shared experts of a few tokens."""

from typing import Any

import pytest
import torch
from oracle import assert_equal_to_float64
from support import assert_refused, assert_rule, backends, bad_calls, checked_mode, device_of

from yaongi.kernels import moe_step, use_backend

Tensor = torch.Tensor


def arguments(
    T: int, D: int, F: int, S: int, E: int, K: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> dict[str, Tensor]:
    """Return arguments of one call: distinct experts per token, entries of a usual size."""
    shapes = {"w_up": (E, F, D), "w_down": (E, D, F), "shared_up": (S, D), "shared_down": (D, S)}
    made = {"x": torch.randn(T, D).to(dtype)}
    made |= {name: (torch.randn(shape) / max(1, shape[-1]) ** 0.5).to(dtype) for name, shape in shapes.items()}
    made["expert_ids"] = torch.rand(T, E).argsort(-1)[:, :K].int()
    made["expert_weights"] = torch.rand(T, K).to(torch.promote_types(dtype, torch.float32))
    return {name: t.to(device) for name, t in made.items()}


@pytest.mark.parametrize("sizes", [(3, 7, 5, 6, 5, 2), (1, 8, 6, 4, 4, 4), (0, 4, 3, 2, 2, 1), (2, 4, 3, 5, 2, 0)])
def test_equals_its_definition(sizes: tuple[int, ...]) -> None:
    args = arguments(*sizes)
    if sizes[0] == 3:
        args["expert_ids"][1] = torch.tensor([-1, 5])
    results = moe_step(**args)
    for t, x in enumerate(args["x"]):
        wanted = args["shared_down"] @ (args["shared_up"] @ x).relu() ** 2
        for expert, weight in zip(args["expert_ids"][t].tolist(), args["expert_weights"][t], strict=True):
            if 0 <= expert < sizes[4]:
                wanted += weight * (args["w_down"][expert] @ (args["w_up"][expert] @ x).relu() ** 2)
        assert_equal_to_float64(results[t], wanted, 1e-13)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [(1, 2048, 512, 1024, 64, 6), (4, 272, 40, 24, 8, 2), (2, 4096, 520, 16, 4, 4), (3, 24, 7, 9, 3, 1)],
    ids=str,
)
def test_follows_the_rule(sizes: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    args = arguments(*sizes, dtype, device_of(backend, "moe_step"))
    args["expert_ids"][-1, 0] = -1
    assert_rule(lambda a: {"y": moe_step(**a)}, args, backend)
    assert_rule(lambda a: {"y": moe_step(**a, settled=True)}, args, backend)


@pytest.mark.parametrize("backend", backends("triton"))
def test_a_token_does_not_depend_on_the_others(backend: str) -> None:
    """Nor on experts that it didn't choose; a NaN in one that it chose is seen."""
    args = arguments(4, 64, 48, 32, 8, 2, torch.bfloat16, device_of(backend, "moe_step"))
    args["expert_ids"] = torch.tensor([[0, 1], [2, 3], [4, 5], [6, -1]], dtype=torch.int32, device=args["x"].device)
    first = {name: t[:1] if t.shape[0] == 4 else t for name, t in args.items()}
    with use_backend(backend):  # type: ignore[arg-type]
        together, alone = moe_step(**args), moe_step(**first)
        args["w_up"][3, 5, 7] = torch.nan
        beside = moe_step(**args)
    if backend == "triton":
        assert torch.equal(alone, together[:1])
    assert beside.isnan().any(-1).tolist() == [False, True, False, False]
    beside[1] = together[1]
    assert torch.equal(beside, together)


def test_opcheck_and_no_gradient() -> None:
    args = arguments(2, 8, 6, 4, 5, 2, torch.float32)
    torch.library.opcheck(torch.ops.yaongi.moe_step.default, (*args.values(), True))
    args["w_up"].requires_grad_()
    assert not moe_step(**args).requires_grad


@bad_calls(
    [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"w_down": torch.ones(5, 8, 7)}, ValueError, "w_down must be (E, D, F) = (5, 8, 6), got (5, 8, 7)"),
        ({"shared_up": torch.ones(4, 9)}, ValueError, "shared_up must be (S, D) = (S, 8), got (4, 9)"),
        ({"shared_down": torch.ones(8, 5)}, ValueError, "shared_down must be (D, S) = (8, 4), got (8, 5)"),
        ({"expert_ids": torch.ones(2, 2)}, TypeError, "expert_ids must be int32, got float32"),
        ({"expert_weights": torch.ones(2, 3)}, ValueError, "expert_weights must be (T, K) = (2, 2), got (2, 3)"),
        ({"settled": None}, TypeError, "settled must be a bool, got NoneType"),
    ]
)
def test_bad_arguments(bad: Any) -> None:
    assert_refused(moe_step, arguments(2, 8, 6, 4, 5, 2, torch.float32) | {"settled": False}, bad)


def test_checked_mode() -> None:
    args = arguments(2, 8, 6, 4, 5, 2, torch.float32)
    for name, bad, message in (
        ("shared_up", torch.inf, "shared_up must be finite, got 32 non-finite values"),
        ("expert_ids", 5, r"expert_ids must be 0 to 4 \(E - 1\), or -1 for none, got 5"),
    ):
        with checked_mode(), pytest.raises(ValueError, match=f"^moe_step: {message}$"):
            moe_step(**args | {name: torch.full_like(args[name], bad)})
