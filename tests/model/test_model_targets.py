"""Targets of one's own, as tuning has: what has none counts nowhere."""

import pytest
import torch
from model_support import ENGRAM, assert_relative, gradients, packed, small_model, token_ids

from yaongi.model.losses import NO_TARGET, head_cross_entropy, head_token_losses, next_tokens

LENGTH = 48
DOCUMENTS = (20, 28)


def masked(ids: torch.Tensor) -> torch.Tensor:
    """Targets (2, L) within two stretches of each row, one per document."""
    targets = torch.full(ids.shape, NO_TARGET)
    for start, end in ((7, 14), (29, 40)):
        targets[:, start:end] = ids[:, start + 1 : end + 1]
    return targets


def test_next_tokens_given_are_the_next_tokens() -> None:
    model = small_model(engram=(ENGRAM,))
    ids, documents = token_ids(model, 2, LENGTH), packed(DOCUMENTS, DOCUMENTS)
    for found, wanted in zip(
        model.losses(ids, documents, targets=next_tokens(ids, documents)), model.losses(ids, documents), strict=True
    ):
        assert torch.equal(found, wanted)


def test_the_mean_is_over_the_targets() -> None:
    model = small_model(dtype=torch.float64)
    ids, documents = token_ids(model, 2, LENGTH), packed(DOCUMENTS, DOCUMENTS)
    targets = masked(ids)
    there = targets >= 0
    wanted = torch.nn.functional.cross_entropy(model(ids, documents)[there], targets[there])
    losses = model.losses(ids, documents, targets=targets)
    assert int(losses.targets) == int(there.sum()) == 36
    assert_relative(losses.cross_entropy_sum, 36 * wanted, 1e-12)
    assert_relative(model.loss(ids, documents, targets=targets), wanted, 1e-12)
    assert model.loss(ids, targets=torch.full_like(ids, -100)).item() == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_the_gradient_is_zero_exactly_where_there_is_no_target(ahead: bool) -> None:
    hidden = torch.randn(LENGTH, 8, requires_grad=True)
    weight, targets = torch.randn(17, 8), torch.randint(-20, 17, (LENGTH,))
    upstream = (torch.tensor(1.0), torch.tensor(0.0)) if ahead else None
    total, _ = head_cross_entropy(hidden, weight, targets, 7, upstream)
    (dhidden,) = torch.autograd.grad(total, hidden)
    assert torch.equal(dhidden.abs().sum(1) > 0, targets >= 0)


@pytest.mark.parametrize("chunk", [5, 64])
def test_the_loss_of_each_token_and_its_gradient(chunk: int) -> None:
    hidden = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 8, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(-9, 17, (30,)), torch.randn(30, dtype=torch.float64)
    losses = head_token_losses(hidden, weight, targets, chunk)
    plain = torch.nn.functional.cross_entropy(
        hidden @ weight.T, targets.clamp(min=-1), reduction="none", ignore_index=-1
    )
    assert_relative(losses, plain, 1e-12)
    found, wanted = (torch.autograd.grad((each * weights).sum(), [hidden, weight]) for each in (losses, plain))
    for got, exact in zip(found, wanted, strict=True):
        assert_relative(got, exact, 1e-12)


def test_a_model_gives_the_loss_of_each_token() -> None:
    model = small_model(engram=(ENGRAM,))
    ids, documents = token_ids(model, 2, LENGTH), packed(DOCUMENTS, DOCUMENTS)
    targets = masked(ids)
    found, whole = (
        model.token_losses(ids, documents, targets=targets),
        model.losses(ids, documents, targets=targets),
    )
    assert torch.equal(found.cross_entropy != 0, targets >= 0)
    assert_relative(found.cross_entropy.sum(), whole.cross_entropy_sum, 1e-6)
    assert torch.equal(found.balance, whole.balance)
    assert torch.equal(found.loads, whole.loads)


def test_what_stands_at_a_masked_place_changes_no_bit() -> None:
    model = small_model(engram=(ENGRAM,))
    ids, documents = token_ids(model, 2, LENGTH), packed(DOCUMENTS, DOCUMENTS)
    targets = masked(ids)
    other = torch.where(targets < 0, torch.randint(-100, 0, ids.shape), targets)
    changed = targets.clone()
    changed[0, 10] = (changed[0, 10] + 1) % model.config.vocab_size
    losses, grads = [], []
    for given in (targets, other, changed):
        losses.append(model.loss(ids, documents, targets=given))
        grads.append(gradients(model, losses[-1]))
    assert torch.equal(losses[0], losses[1])
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(("pattern", "tolerance"), [("M*M", 0), ("MEM*ME", 1e-14)])
def test_the_loss_of_a_document_doesn_t_depend_on_what_is_packed_before_it(pattern: str, tolerance: float) -> None:
    """To the bit; the products of experts are as long as what is packed, and round by that."""
    model = small_model(pattern, dtype=torch.float64, engram=(ENGRAM,))
    ids, documents = token_ids(model, 1, LENGTH), packed(DOCUMENTS)
    targets = masked(ids)
    targets[:, : DOCUMENTS[0]] = NO_TARGET
    before = model.loss(ids, documents, targets=targets).item()
    ids[:, : DOCUMENTS[0]] = token_ids(model, 1, DOCUMENTS[0])
    assert model.loss(ids, documents, targets=targets).item() == pytest.approx(before, rel=tolerance, abs=0)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.int32), TypeError, "targets must be int64, got int32"),
        (torch.zeros(2, 4, dtype=torch.int64), ValueError, r"targets must be \(2, 5\) like input_ids, got \(2, 4\)"),
        (torch.full((2, 5), 61), ValueError, "targets must be below 61, got 61"),
    ],
)
def test_mistakes(targets: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_model("M").losses(torch.zeros(2, 5, dtype=torch.int64), targets=targets)
