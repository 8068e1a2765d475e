"""The guard counts and names bad steps, and detects spikes."""

import random

import pytest
import torch

from yaongi.train.step.guard import BadStepError, Guard, first_nonfinite


def test_the_first_bad_tensor_is_named() -> None:
    """Check the order; of sparse tensors the values count, and integer and empty tensors don't."""
    good, bad = torch.ones(2, dtype=torch.bfloat16), torch.tensor([1.0, torch.nan])
    sparse = torch.sparse_coo_tensor([[3]], [[torch.inf, 1.0]], (5, 2), check_invariants=True)
    fine = [("a", good), ("b", torch.arange(3)), ("c", torch.empty(0)), ("d", torch.full((9,), 3e38))]
    assert first_nonfinite([*fine, ("e", sparse), ("f", bad)]) == "e"
    assert first_nonfinite([*fine, ("f", bad), ("e", sparse)]) == "f"
    assert first_nonfinite(fine) is None
    assert first_nonfinite([]) is None


def test_too_many_in_a_row() -> None:
    """Allow two bad steps in a row; a good step resets the count."""
    guard = Guard(2)
    for _ in range(2):
        guard.bad(1, "the loss", range(4))
    guard.good()
    message = guard.bad(7, "the loss", [3, 4, 5, 9])
    assert message == "step 7: the loss is not finite; batch: samples 3-5, 9; update skipped (1 of 2 allowed in a row)"
    guard.bad(8, "the loss", [1])
    with pytest.raises(BadStepError, match="3 bad steps in a row, 2 allowed"):
        guard.bad(9, "the loss", [1])
    assert guard.skipped == 5


def test_spikes() -> None:
    """Detect a loss 6 σ above the window, but not with too short a window; another guard takes over the state."""
    rng = random.Random(0)
    guard = Guard(1)
    assert not guard.is_spike(100.0)
    guard = Guard(1)
    assert not any(guard.is_spike(3 + 0.1 * rng.gauss(0, 1)) for _ in range(100))
    again = Guard(1)
    again.load_state_dict(guard.state_dict())
    assert again.is_spike(4.0)
    assert not again.is_spike(3.1)
