"""Finite inputs give finite losses and gradients: at the ends of what floats hold, without targets, with masked logits.

Beyond 1e18 the square of a logsumexp is no float32 any more, so logits end there.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_support import ENGRAM, packed, small_model, token_ids
from oracle import assert_equal_to_float64

from yaongi.kernels import cross_entropy, moe_route
from yaongi.model.losses import head_cross_entropy, module_cross_entropy
from yaongi.model.mixers.router import sequence_balance

Tensor = torch.Tensor
FINITE = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False, width=32)
LOGIT = st.floats(-(2.0**60), 2.0**60, allow_subnormal=False, width=32)
TARGETS = st.lists(st.sampled_from([-100, -1, 0, 4]), min_size=3, max_size=3)


def rows_of(number: st.SearchStrategy[float], width: int) -> st.SearchStrategy[list[list[float]]]:
    """Return a strategy of three rows of numbers."""
    return st.lists(st.lists(number, min_size=width, max_size=width), min_size=3, max_size=3)


def assert_finite(losses: list[Tensor], leaves: list[Tensor]) -> None:
    """Check losses and the gradients of their sum."""
    assert all(loss.isfinite().all() for loss in losses), losses
    gradients = torch.autograd.grad(sum(loss.sum() for loss in losses), leaves)  # type: ignore[arg-type]
    assert all(gradient.isfinite().all() for gradient in gradients), gradients


@given(rows=rows_of(LOGIT, 5), targets=TARGETS, masked=st.none() | st.integers(1, 3))
@settings(deadline=None, max_examples=200)
def test_any_logits_any_targets_and_a_masked_column(
    rows: list[list[float]], targets: list[int], masked: int | None
) -> None:
    logits = torch.tensor(rows)
    if masked is not None:
        logits[:, masked] = -torch.inf
    labels = torch.tensor(targets)
    losses, normalizers = cross_entropy(logits.requires_grad_(), labels)
    assert (losses[labels < 0] == 0).all()
    assert_finite([losses, torch.where(labels < 0, 0, normalizers)], [logits])


@given(rows=rows_of(LOGIT, 4), targets=TARGETS)
@settings(deadline=None, max_examples=100)
def test_the_heads_losses_over_any_hidden_states(rows: list[list[float]], targets: list[int]) -> None:
    hidden, labels = torch.tensor(rows), torch.tensor(targets)
    head = torch.nn.Linear(4, 5, bias=False)
    hidden = (hidden / 64).requires_grad_()
    for sums in (
        head_cross_entropy(hidden, head.weight, labels),
        module_cross_entropy(hidden, head, labels, 5),
    ):
        assert_finite([sums[0]], [hidden, head.weight])
    assert_finite([head_cross_entropy(hidden.detach().requires_grad_(), head.weight, labels - 200)[1]], [head.weight])


@given(rows=rows_of(FINITE, 6), masked=st.none() | st.integers(0, 5))
@settings(deadline=None, max_examples=200)
def test_any_router_logits(rows: list[list[float]], masked: int | None) -> None:
    logits = torch.tensor(rows)
    if masked is not None:
        logits[:, masked] = -torch.inf
    logits.requires_grad_()
    ids, weights, load = moe_route(logits, torch.zeros(6), 2, 2.5)
    assert int(load.sum()) == 6
    balance = sequence_balance(logits[None], ids[None])
    assert 0 <= balance <= 3.001  # E / K if one expert has all
    assert_finite([weights, balance], [logits])


@pytest.mark.parametrize("shift", [0.0, -20.0, -120.0, -3e4, 60.0])
def test_the_balance_does_not_lose_its_value_where_scores_vanish(shift: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 6, dtype=torch.float64) + shift
    ids = torch.randint(0, 6, (2, 9, 2)).int()
    found = sequence_balance(logits.float().requires_grad_(), ids)
    assert_equal_to_float64(found, sequence_balance(logits, ids), 2e-3 if shift == -3e4 else 1e-5)
    if shift == -20:
        scores = logits.sigmoid()
        share = torch.nn.functional.one_hot(ids.flatten(1).long(), 6).sum(1) * (6 / (2 * 9))
        wanted = (share * (scores / scores.sum(-1, keepdim=True)).mean(1)).sum(-1).mean()
        assert_equal_to_float64(found, wanted, 1e-5)


@pytest.mark.parametrize("router", [1.0, 1e4, -1e4])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_model_whose_router_is_saturated(router: float, ignored: bool) -> None:
    """Also with rows of documents of one token, which have no targets at all."""
    model = small_model(engram=[ENGRAM])
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("gate.weight"):
                tensor.copy_(router * tensor.abs() if router != 1 else tensor)
            if name.endswith("norm.weight") and router < 0:
                tensor.abs_()
    ids = token_ids(model, 2, 8)
    losses = model.losses(ids, packed((1,) * 8, (1,) * 8) if ignored else None)
    assert int(losses.targets) == (0 if ignored else 14)
    (losses.cross_entropy_sum + 1e-4 * losses.z_sum + 1e-2 * losses.balance).backward()
    assert all(torch.as_tensor(value).isfinite().all() for value in losses)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.to_dense().isfinite().all(), name
