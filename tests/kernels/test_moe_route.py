"""`moe_route`: choice, ties, weights, load and gradient against the definition."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_refused, assert_rule, backends, bad_calls, checked_mode, device_of

from yaongi.kernels import moe_route, use_backend


def weights_by_definition(logits: torch.Tensor, expert_ids: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute the weights of given experts; differentiable by autograd."""
    chosen = logits.sigmoid().gather(-1, expert_ids.long())
    return scale * chosen / chosen.sum(-1, keepdim=True)


def choice_by_definition(logits: torch.Tensor, bias: torch.Tensor, top_k: int) -> list[list[int]]:
    """Return each token's experts, ranked in Python: largest score + bias first, ties to the lowest index."""
    ranking = (logits.sigmoid() + bias).tolist()
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in ranking]


def results(logits: torch.Tensor, bias: torch.Tensor, top_k: int, scale: float) -> dict[str, torch.Tensor]:
    """Return the op's results, and the gradient of Σ weights·cos(0, 1, 2, …)."""
    logits = logits.detach().requires_grad_()
    expert_ids, expert_weights, load = moe_route(logits, bias, top_k, scale)
    dweights = torch.arange(expert_weights.numel(), dtype=torch.float64, device=logits.device).cos()
    dweights = dweights.view(expert_weights.shape).to(logits.dtype)
    (dlogits,) = torch.autograd.grad(expert_weights, logits, dweights)
    return {"ids": expert_ids, "weights": expert_weights.detach(), "load": load, "dlogits": dlogits}


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(0, 9),
    E=st.integers(1, 9),
    top_k=st.integers(1, 9),
    scale=st.sampled_from([1.0, 2.5, -0.5]),
    levels=st.sampled_from([1, 2, 3, 1000]),  # few levels cause ties
    seed=st.integers(0, 2**16),
)
def test_any_shape_equals_the_definition(T: int, E: int, top_k: int, scale: float, levels: int, seed: int) -> None:
    torch.manual_seed(seed)
    top_k = min(top_k, E)
    logits = (torch.randint(0, levels, (T, E)) / levels * 4 - 2).double()
    bias = (torch.randint(0, levels, (E,)) / levels - 0.5).double()
    got = results(logits, bias, top_k, scale)
    assert got["ids"].tolist() == choice_by_definition(logits, bias, top_k)
    assert got["load"].tolist() == [got["ids"].flatten().tolist().count(e) for e in range(E)]
    logits.requires_grad_()
    weights = weights_by_definition(logits, got["ids"], scale)
    dweights = torch.arange(weights.numel(), dtype=torch.float64).cos().view(weights.shape)
    (dlogits,) = torch.autograd.grad(weights, logits, dweights)
    torch.testing.assert_close(got["weights"], weights.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(got["dlogits"], dlogits, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize(("T", "E", "top_k"), [(1000, 64, 6), (1, 8, 1), (0, 8, 2), (33, 5, 5), (129, 256, 16)])
def test_float64_rule(T: int, E: int, top_k: int, backend: str) -> None:
    device = device_of(backend, "moe_route")
    logits, bias = torch.randn(T, E, device=device), 0.1 * torch.randn(E, device=device)
    assert_rule(lambda a: results(*a, top_k, 2.5), (logits, bias), backend)


@pytest.mark.parametrize("backend", backends("triton"))
def test_ties_go_to_the_lowest_index(backend: str) -> None:
    device = device_of(backend, "moe_route")
    logits = torch.tensor(
        [[0.0, 0, 0, 0, 0], [1, 3, 1, 3, 1], [200, 300, 100, 0, 400]], device=device
    )  # saturated: 1.0
    with use_backend(backend):
        ids, _, load = moe_route(logits, torch.zeros(5, device=device), 3)
    assert ids.tolist() == [[0, 1, 2], [1, 3, 0], [0, 1, 2]]
    assert load.tolist() == [3, 3, 2, 1, 0]


@pytest.mark.parametrize("backend", backends("triton"))
def test_bias_steers_the_choice_alone(backend: str) -> None:
    device = device_of(backend, "moe_route")
    logits = torch.tensor([[2.0, 1, 0, -1]], device=device)
    bias = torch.tensor([0.0, 0, 0, 5], device=device, requires_grad=True)
    with use_backend(backend):
        ids, weights, load = moe_route(logits.requires_grad_(), bias, 2, 2.5)
        weights[0, 0].backward()
    assert ids.tolist() == [[3, 0]]
    assert load.tolist() == [1, 0, 0, 1]
    score = torch.tensor([-1.0, 2.0]).sigmoid()
    torch.testing.assert_close(weights.detach().cpu(), 2.5 * (score / score.sum())[None])
    assert bias.grad is None
    assert logits.grad is not None
    assert logits.grad[0, 1:3].tolist() == [0, 0]  # the experts not chosen


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("logit", [-1000.0, -100.0, -60.0, 1000.0])
def test_extreme_logits_are_weighed_too(logit: float, backend: str) -> None:
    """Equal logits have equal shares, even where every score underflows."""
    device = device_of(backend, "moe_route")
    with use_backend(backend):
        got = results(torch.full((3, 4), logit, device=device), torch.zeros(4, device=device), 2, 2.5)
    assert got["dlogits"].isfinite().all()
    torch.testing.assert_close(got["weights"].cpu(), torch.full((3, 2), 1.25), rtol=1e-6, atol=0)


def test_results_are_contiguous_for_any_layout() -> None:
    logits = torch.randn(6, 5).mT.contiguous().mT
    got = moe_route(logits, torch.zeros(5), 3)
    assert all(t.is_contiguous() for t in got)
    assert all(
        torch.equal(one, two) for one, two in zip(got, moe_route(logits.contiguous(), torch.zeros(5), 3), strict=True)
    )


def test_gradcheck() -> None:
    logits, bias = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), torch.randn(6).double()
    assert torch.autograd.gradcheck(lambda x: moe_route(x, bias, 3, 2.5)[1], logits)


def test_without_gradient() -> None:
    _, weights, _ = moe_route(torch.randn(3, 4), torch.zeros(4, requires_grad=True), 2)
    assert not moe_route(torch.randn(3, 4), torch.zeros(4), 2)[1].requires_grad
    assert weights.requires_grad  # torch sets this; the bias still gets no gradient
    weights.sum().backward()


@pytest.mark.parametrize("T", [0, 7])
def test_opcheck(T: int) -> None:
    logits, bias = torch.randn(T, 6), torch.randn(6)
    torch.library.opcheck(torch.ops.yaongi.moe_route.default, (logits, bias, 3, 2.5))
    ids, weights, _ = moe_route(logits, bias, 3, 2.5)
    torch.library.opcheck(torch.ops.yaongi.moe_route_backward.default, (weights, logits, ids, 2.5))
    # opcheck's fourth test can't differentiate an op whose first result is an integer tensor; test_compile covers it
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (logits.requires_grad_(), bias, 3, 2.5)
    torch.library.opcheck(torch.ops.yaongi.moe_route.default, arguments, test_utils=utilities)


def test_compile() -> None:
    args = torch.randn(9, 6), torch.randn(6), 3, 2.5
    expected = results(*args)
    logits = args[0].clone().requires_grad_()
    route = torch.compile(moe_route, fullgraph=True, backend="aot_eager")
    ids, weights, load = route(logits, *args[1:])
    weights.backward(torch.arange(27.0).double().cos().view(9, 3).float())
    assert torch.equal(ids, expected["ids"])
    assert torch.equal(load, expected["load"])
    torch.testing.assert_close(weights.detach(), expected["weights"])
    torch.testing.assert_close(logits.grad, expected["dlogits"])


def test_a_second_derivative_is_refused() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    weights = moe_route(logits, torch.zeros(4), 2)[1]
    (dlogits,) = torch.autograd.grad(weights[:, 0].sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_route_backward: there is no derivative of this op"):
        dlogits.sum().backward()


GOOD = {"logits": torch.zeros(3, 4), "bias": torch.zeros(4), "top_k": 2, "scale": 2.5}


@bad_calls(
    [
        ({"logits": torch.full((3, 4), torch.nan)}, ValueError, "logits must be finite, got 12 non-finite values"),
        ({"bias": torch.full((4,), torch.inf)}, ValueError, "bias must be finite, got 4 non-finite values"),
    ]
)
def test_checked_mode(bad: Any) -> None:
    with checked_mode():
        moe_route(**GOOD)
        assert_refused(moe_route, GOOD, bad)
    moe_route(**GOOD | bad.changes)


@bad_calls(
    [
        ({"logits": [[0.0]]}, TypeError, "logits must be a tensor, got list"),
        ({"logits": torch.zeros(3, 4).bfloat16()}, TypeError, "logits must be float32 or float64, got bfloat16"),
        ({"logits": torch.zeros(3, 4).int()}, TypeError, "logits must be float32 or float64, got int32"),
        ({"logits": torch.zeros(3, 4).double()}, TypeError, "bias must be float64, got float32"),
        ({"logits": torch.zeros(4)}, ValueError, "logits must be (T, E), got (4,)"),
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, "logits must be (T, E), got (2, 3, 4)"),
        ({"logits": torch.zeros(3, 5)}, ValueError, "bias must be (E) = (5), got (4,)"),
        (
            {"logits": torch.zeros(3, 4, device="meta")},
            TypeError,
            "bias must be on meta like the first tensor, got cpu",
        ),
        ({"bias": None}, TypeError, "bias must be a tensor, got NoneType"),
        ({"bias": torch.zeros(4).half()}, TypeError, "bias must be float32, got float16"),
        ({"bias": torch.zeros(1, 4)}, ValueError, "bias must be (E) = (4), got (1, 4)"),
        ({"bias": torch.zeros(4, device="meta")}, TypeError, "bias must be on cpu like the first tensor, got meta"),
        ({"top_k": 0}, ValueError, "top_k must be 1 to 4 (E), got 0"),
        ({"top_k": 5}, ValueError, "top_k must be 1 to 4 (E), got 5"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int, got float"),
        ({"top_k": True}, TypeError, "top_k must be an int, got bool"),
        ({"scale": "2"}, TypeError, "scale must be a number, got str"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"scale": torch.ones(())}, TypeError, "scale must be a number, got Tensor"),
    ]
)
def test_bad_arguments(bad: Any) -> None:
    assert_refused(moe_route, GOOD, bad)
