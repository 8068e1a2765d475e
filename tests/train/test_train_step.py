"""One step: exact for any micro-batch size, clipped, and without an update if it is bad."""

from pathlib import Path

import pytest
import torch
from bench_train_step import trainer_step
from small_run import losses, session_of

from yaongi.model import Yaongi
from yaongi.train.config import load_config
from yaongi.train.session import Session
from yaongi.train.step.guard import BadStepError

EXACT = ("--dtype", "float64")


def weights(session: Session) -> dict[str, torch.Tensor]:
    """Return copies of the model's parameters and buffers."""
    return {name: tensor.clone() for name, tensor in session.model.state_dict().items()}


def train(session: Session, steps: int) -> list[float]:
    """Train some steps and return their losses."""
    with session:
        batches = session.batches()
        for _ in range(steps):
            session.train_step(next(batches))
        batches.close()
    return [loss for _, loss, _ in losses(session.config.run.out)]


def test_micro_batches_don_t_matter(tokens: Path, tmp_path: Path) -> None:
    """Compare one pass of 8 rows with 8 of one: the same losses and weights, though rows differ in their targets."""
    results = []
    for rows in ("8", "1"):
        session = session_of(tokens, tmp_path / rows, *EXACT, "--micro-rows", rows, "--z-loss", "1e-3")
        results.append((train(session, 3), weights(session)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], rtol=1e-9, atol=1e-10)


def test_recompute_changes_nothing(tokens: Path, tmp_path: Path) -> None:
    """Check that recomputation only takes time."""
    policies = ("none", "all", "mamba,4")
    plain, *again = (train(session_of(tokens, tmp_path / p, "--recompute", p), 2) for p in policies)
    assert again == [plain, plain]


def test_clipping(tokens: Path, tmp_path: Path) -> None:
    """Check that the norm is that of all gradients together, and that the optimizer gets gradients with the limit's."""
    session = session_of(tokens, tmp_path / "run", *EXACT, "--clip", "0.01")
    seen: list[float] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        squares = [p.grad.to_dense().square().sum() for g in optimizer.param_groups for p in g["params"]]
        seen.append(float(torch.stack(squares).sum().sqrt()))

    session.optimizer.register_step_pre_hook(look)
    train(session, 1)
    assert seen == pytest.approx([0.01], rel=1e-6)


def test_the_router_s_bias_follows_the_whole_batch(tokens: Path, tmp_path: Path) -> None:
    """Check one centred step of 1e-3 by the load of all micro-batches."""
    session = session_of(tokens, tmp_path / "run", "--micro-rows", "2", "--bias-travel", "0", "--bias-rate", "1e-3")
    loads: list[torch.Tensor] = []
    update = session.model.update_router_bias
    session.model.update_router_bias = lambda load, rate: (loads.append(load), update(load, rate))  # type: ignore[assignment]
    train(session, 1)
    assert len(loads) == 1
    assert loads[0].sum() == 512 * 2
    bias = session.model.backbone.layers[1].mixer.gate.e_score_correction_bias
    signs = (loads[0].double().mean() - loads[0][0].double()).sign()
    assert torch.equal(bias, (1e-3 * (signs - signs.mean())).float())


@pytest.mark.parametrize("by", [(), ("--matrix-optimizer", "adamw", "--matrix-lr", "1e-3")], ids=["teon", "adamw"])
def test_experts_without_tokens_are_left_alone(by: tuple[str, ...], tokens: Path, tmp_path: Path) -> None:
    """Not a bit of their weights and their state changes in a step, though a step before gave them momenta."""
    session = session_of(tokens, tmp_path / "run", *by)
    gate = session.model.backbone.layers[1].mixer.gate
    names = [n for n in session.optimizer.tensors() if "mixer.experts." in n]

    def now() -> list[torch.Tensor]:
        state = [t for n in names for t in session.optimizer.tensors()[n].values() if t.ndim]
        return [t.clone() for t in [*state, *(session.model.get_parameter(n).detach() for n in names)]]

    with session:
        batches = session.batches()
        session.train_step(next(batches))
        gate.e_score_correction_bias[2] = -100
        before = now()
        session.train_step(next(batches))
        batches.close()
    for old, new in zip(before, now(), strict=True):
        assert old.any()
        assert torch.equal(old[2], new[2])
        assert not any(torch.equal(old[e], new[e]) for e in (0, 1, 3))


def test_a_nan_in_a_gradient(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Update nothing, name the tensor and the rows, and stop the run after one bad step too many."""
    session = session_of(tokens, tmp_path / "run", "--bad-steps", "1")
    name = "backbone.layers.0.norm.weight"  # not a projection: autograd never sees its gradient
    before = weights(session)
    with session:
        batches = session.batches()
        session.model.get_parameter(name).register_hook(lambda gradient: gradient * torch.nan)
        session.train_step(next(batches))
        assert all(torch.equal(t, before[n]) for n, t in session.model.state_dict().items())
        assert f"step 1: the gradient of {name} is not finite; batch: samples 0-7" in capsys.readouterr().err
        with pytest.raises(BadStepError, match=r"samples 8-15.*2 bad steps in a row, 1 allowed"):
            session.train_step(next(batches))
        batches.close()
    assert all(torch.equal(t, before[n]) for n, t in session.model.state_dict().items())


def test_a_nan_in_a_weight(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Name the weight, not the tensors that it spoils, and save no checkpoint with it."""
    session = session_of(tokens, tmp_path / "run")
    name = "backbone.layers.0.mixer.out_proj.weight"
    with session:
        batches = session.batches()
        session.train_step(next(batches))
        session.save(wait=True)
        with torch.no_grad():
            session.model.get_parameter(name)[3, 4] = torch.nan
        session.train_step(next(batches))
        assert f"step 2: the weight {name} is not finite" in capsys.readouterr().err
        match = f"model.{name} is not finite; step 2 is not saved, the last checkpoint is .*step-00000001"
        with pytest.raises(ValueError, match=match):
            session.save(wait=True)
        batches.close()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000001"]


def test_the_run_goes_on_after_a_bad_step(tokens: Path, tmp_path: Path) -> None:
    """Check that the next step has new data, and that the bad step is recorded."""
    session = session_of(tokens, tmp_path / "run")
    with session:
        batches = session.batches()
        handle = session.model.backbone.norm_f.weight.register_hook(lambda gradient: gradient * torch.inf)
        session.train_step(next(batches))
        handle.remove()
        session.train_step(next(batches))
        batches.close()
    events = [line.split('"')[3] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert events == ["plan", "start", "bad_step", "step"]
    assert session.guard.skipped == 1
    assert session.loader.state_dict()["samples"] == 16


def test_the_benchmark_times_the_trainer_s_step() -> None:
    """It builds the step by itself, without a run: what the trainer's parts take must not change under it."""
    config = load_config("yaongi-tiny")
    model = Yaongi(config.model)
    before = model.lm_head.weight.detach().clone()
    trainer_step(model, config.train, 1, torch.device("cpu"))(2)
    assert not torch.equal(model.lm_head.weight, before)
