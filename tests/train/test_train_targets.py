"""A step on targets of its own: its mean is over those of the global batch, however they lie in the micro-batches."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import losses, session_of

from yaongi.data.row_loader import Batch
from yaongi.model.losses import NO_TARGET, next_tokens

EXACT = ("--dtype", "float64", "--z-loss", "1e-3")


def with_targets(batch: Batch, *, none: bool = False) -> Batch:
    """Give row n of the order n stretches of 8 targets: the first row of a step has none, another one many."""
    targets = next_tokens(batch.input_ids, batch.document_ids)
    counts = 0 * batch.samples if none else batch.samples % 8
    far = torch.arange(targets.shape[1])[None] >= 8 * counts[:, None]
    return replace(batch, targets=targets.masked_fill(far, NO_TARGET))


def test_micro_batches_don_t_matter(tokens: Path, tmp_path: Path) -> None:
    """Compare one pass of 8 rows with 8 of one, the first of which has no target."""
    results = []
    for rows in ("8", "1"):
        session = session_of(tokens, tmp_path / rows, *EXACT, "--micro-rows", rows)
        with session:
            batches = session.batches()
            for _ in range(2):
                session.train_step([with_targets(batch) for batch in next(batches)])
            batches.close()
        results.append((losses(tmp_path / rows), session.model.state_dict()))
    assert [loss for _, loss, _ in results[0][0]] == pytest.approx([loss for _, loss, _ in results[1][0]], rel=1e-12)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], rtol=1e-9, atol=1e-10)


def test_a_step_s_loss_is_the_mean_over_its_targets(tokens: Path, tmp_path: Path) -> None:
    session = session_of(tokens, tmp_path / "run", "--dtype", "float64", "--micro-rows", "2")
    with session:
        batches = session.batches()
        given = [with_targets(batch) for batch in next(batches)]
        parts = [session.model.losses(b.input_ids, b.document_ids, targets=b.targets) for b in given]
        session.train_step(given)
        batches.close()
    wanted = sum(part.cross_entropy_sum.item() for part in parts) / sum(int(part.targets) for part in parts)
    assert losses(tmp_path / "run")[0][1] == pytest.approx(wanted, rel=1e-12)


def test_a_batch_without_targets_is_a_mistake(tokens: Path, tmp_path: Path) -> None:
    session = session_of(tokens, tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    with session:
        batches = session.batches()
        with pytest.raises(ValueError, match="a batch must have a target, got none in its 8 rows"):
            session.train_step([with_targets(batch, none=True) for batch in next(batches)])
        batches.close()
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.model.state_dict().items())
