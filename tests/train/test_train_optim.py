"""Every role's update against its formula, written out in float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import TOML

from yaongi.kernels import newton_schulz
from yaongi.model import Yaongi, load_preset
from yaongi.train.config import Training
from yaongi.train.optimizer.role_optimizer import RoleOptimizer
from yaongi.train.optimizer.roles import Role, parameter_roles
from yaongi.train.optimizer.sparse_adam import adam_rows

TRAIN = Training(batch_tokens=4096, row_tokens=64)
RATES = {"matrix": 0.02, "vector": 0.003, "table": 0.015}
Tensor = torch.Tensor


@pytest.fixture
def build(tmp_path: Path) -> Callable[[torch.dtype], Yaongi]:
    """Return a function that builds the small model in a dtype."""
    path = tmp_path / "small.toml"
    path.write_text(TOML)
    return lambda dtype: Yaongi(load_preset(path), dtype=dtype)


def give_gradients(model: Yaongi, seed: int) -> dict[str, Tensor]:
    """Set random gradients and return them; those of the table touch three rows."""
    generator = torch.Generator().manual_seed(seed)
    given = {}
    for name, parameter in model.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("engram.table.weight"):
            keep = torch.zeros(len(gradient), 1, dtype=torch.float64)
            keep[[1, 5, 6]] = 1
            gradient *= keep
        given[name] = gradient
        wide = parameter.dtype if parameter.dtype == torch.float64 else torch.float32
        dense = gradient.to(wide)
        parameter.grad = dense.to_sparse(1) if name.endswith("engram.table.weight") else dense
    return given


def muon(weight: Tensor, gradients: list[Tensor], others: list[list[Tensor]]) -> Tensor:
    """Return the weight after all steps, orthogonalised jointly with the gradients `others`, which follow its own."""
    momenta = [torch.zeros_like(weight) for _ in range(1 + len(others))]
    for step, gradient in enumerate(gradients):
        directions = []
        for i, g in enumerate([gradient, *(other[step] for other in others)]):
            momenta[i] = 0.95 * momenta[i] + g
            directions.append(g + 0.95 * momenta[i])
        m, n = weight.shape[-2:]
        o = newton_schulz(torch.cat(directions, -1))[..., :n]
        weight = (1 - 0.02 * 0.1) * weight - 0.02 * math.sqrt(m / n) * o
    return weight


def adamw(weight: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Return the weight after all steps."""
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, g in enumerate(gradients, 1):
        mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g**2
        update = mean / (1 - 0.9**step) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        weight = (1 - lr * decay) * weight - lr * update
    return weight


def expected(name: str, role: Role, start: dict[str, Tensor], gradients: dict[str, list[Tensor]]) -> Tensor:
    """Return the value that a parameter must have after the steps."""
    weight, mine = start[name], gradients[name]
    if role.kind == "table":
        touched = mine[0].any(-1, keepdim=True)
        return torch.where(touched, adamw(weight, mine, 0.015, 0.0), weight)
    if role.kind == "adamw":
        return adamw(weight, mine, 0.003, 0.1 if role.decay else 0.0)
    if role.splits:
        parts = []
        for split in role.splits:
            rows = slice(split.start, split.stop)
            part = [g[rows] for g in mine]
            is_muon = split.kind == "muon"
            parts.append(muon(weight[rows], part, []) if is_muon else adamw(weight[rows], part, 0.003, 0.0))
        return torch.cat(parts)
    return muon(weight, mine, [])


def test_every_role(build: Callable[[torch.dtype], Yaongi]) -> None:
    """Do three steps of the model; Q, K and V of the two attention layers are each orthogonalised jointly."""
    model = build(torch.float64)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = RoleOptimizer(model, TRAIN, torch.float64)
    optimizer.set_lr(RATES)
    gradients: dict[str, list[Tensor]] = {name: [] for name in start}
    for step in range(3):
        for name, gradient in give_gradients(model, step).items():
            gradients[name].append(gradient)
        optimizer.step()
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if roles[name].kind == "qkv":
            continue
        torch.testing.assert_close(
            parameter.detach(), expected(name, roles[name], start, gradients), rtol=1e-9, atol=1e-11
        )
    first, second = (f"backbone.layers.{i}.mixer.q_proj.weight" for i in (2, 4))
    wanted = muon(start[first], gradients[first], [gradients[second]])
    torch.testing.assert_close(model.get_parameter(first).detach(), wanted, rtol=1e-9, atol=1e-11)


def test_stacks_of_mamba_and_shared_experts(build: Callable[[torch.dtype], Yaongi]) -> None:
    """Stack in_proj's parts, out_proj and the shared experts' matrices with those of the next layer of their kind."""
    model = build(torch.float64)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = RoleOptimizer(model, replace(TRAIN, stacked="mamba,shared"), torch.float64)
    optimizer.set_lr(RATES)
    gradients = give_gradients(model, 0)
    optimizer.step()

    def stacked(part: str, layers: tuple[int, int], rows: slice = slice(None)) -> None:
        first, second = (f"backbone.layers.{i}.mixer.{part}.weight" for i in layers)
        wanted = muon(start[first][rows], [gradients[first][rows]], [[gradients[second][rows]]])
        torch.testing.assert_close(model.get_parameter(first).detach()[rows], wanted, rtol=1e-9, atol=1e-11)

    stacked("out_proj", (0, 3))
    stacked("in_proj", (0, 3), slice(32, 64))
    query = "backbone.layers.2.mixer.q_proj.weight"
    alone = muon(start[query], [gradients[query]], [])
    torch.testing.assert_close(model.get_parameter(query).detach(), alone, rtol=1e-9, atol=1e-11)


def test_adamw_on_the_matrices(build: Callable[[torch.dtype], Yaongi]) -> None:
    """Compare with torch's AdamW, each kind with its own learning rate; everything else is as with Teon."""
    model, other = build(torch.float64), build(torch.float64)
    optimizer = RoleOptimizer(model, replace(TRAIN, matrix_optimizer="adamw"), torch.float64)
    usual = RoleOptimizer(other, TRAIN, torch.float64)
    name = "backbone.layers.1.mixer.experts.up_proj"
    expected = model.get_parameter(name).detach().clone().requires_grad_()
    torchs = torch.optim.AdamW([expected], lr=RATES["matrix"], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(3):
        expected.grad = give_gradients(model, step)[name]
        give_gradients(other, step)
        for each in (optimizer, usual):
            each.set_lr(RATES)
            each.step()
        torchs.step()
    torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-12, atol=1e-14)
    assert not any("momentum" in state for state in optimizer.tensors().values())
    for kept in ("backbone.embeddings.weight", "backbone.layers.0.mixer.A_log"):
        assert torch.equal(model.get_parameter(kept), other.get_parameter(kept))
    assert not torch.equal(
        model.get_parameter("backbone.layers.0.mixer.in_proj.weight"),
        other.get_parameter("backbone.layers.0.mixer.in_proj.weight"),
    )


def test_masters(build: Callable[[torch.dtype], Yaongi]) -> None:
    """Check that tiny steps add up in float32 master copies and that parameters are their casts; A_log has none."""
    model = build(torch.bfloat16)
    optimizer = RoleOptimizer(model, TRAIN, torch.bfloat16)
    optimizer.set_lr({kind: rate * 1e-4 for kind, rate in RATES.items()})
    before = {name: s["master"].clone() for name, s in optimizer.tensors().items() if "master" in s}
    for step in range(4):
        give_gradients(model, step)
        optimizer.step()
    after = optimizer.tensors()
    assert "master" not in after["backbone.layers.0.mixer.A_log"]
    for name, master in before.items():
        assert not torch.equal(after[name]["master"], master)
        assert torch.equal(model.get_parameter(name).detach(), after[name]["master"].bfloat16())


def test_gradients_add_up_in_float32(build: Callable[[torch.dtype], Yaongi]) -> None:
    """Add 256 and 1, which would give 256 in bfloat16."""
    model = build(torch.bfloat16)
    RoleOptimizer(model, TRAIN, torch.bfloat16)
    weight = model.lm_head.weight
    for scale in (256.0, 1.0):
        (weight * scale).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, torch.full_like(weight.grad, 257.0))


def test_rows_that_were_not_read_stay(build: Callable[[torch.dtype], Yaongi]) -> None:
    """Check weights and moments, for dense and sparse gradients, also for a sparse one that lists a row of zeros."""
    torch.manual_seed(1)
    gradient = torch.randn(8, 3).mul_(torch.tensor([0, 1, 0, 0, 1, 0, 0, 0]).unsqueeze(1))
    results = []
    named = torch.sparse_coo_tensor(torch.tensor([[1, 4, 6]]), gradient[[1, 4, 6]], gradient.shape)
    for given in (gradient, gradient.to_sparse(1), named):
        weight, mean, square = torch.ones(8, 3), torch.ones(8, 3), torch.ones(8, 3)
        settings = {"step": 5, "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
        adam_rows(weight, given, mean, square, parameter=weight, **settings)  # type: ignore[arg-type]
        untouched = [0, 2, 3, 5, 6, 7]
        assert all(torch.equal(t[untouched], torch.ones(6, 3)) for t in (weight, mean, square))
        assert not any((t[[1, 4]] == 1).any() for t in (weight, mean, square))
        results.append(weight)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_messages(build: Callable[[torch.dtype], Yaongi]) -> None:
    """Check the errors for a closure and for a parameter without a gradient."""
    optimizer = RoleOptimizer(build(torch.float32), TRAIN, torch.float32)
    with pytest.raises(ValueError, match="closure must be None"):
        optimizer.step(lambda: 1.0)
    missing = r"every parameter must have a gradient, got none of backbone.embeddings.weight and \d+ more"
    with pytest.raises(RuntimeError, match=missing):
        optimizer.step()


def same_bits(mine: RoleOptimizer, theirs: RoleOptimizer) -> bool:
    """Return whether all parameters and all state are equal."""
    left, right = mine.tensors(), theirs.tensors()
    pairs = [(left[name][key], right[name][key]) for name in right for key in right[name]]
    pairs += [(p, q) for a, b in zip(mine.param_groups, theirs.param_groups, strict=True)
              for p, q in zip(a["params"], b["params"], strict=True)]  # fmt: skip
    return left.keys() == right.keys() and all(p.dtype == q.dtype and torch.equal(p, q) for p, q in pairs)


def test_state_dict_round_trip(build: Callable[[torch.dtype], Yaongi], tmp_path: Path) -> None:
    """Restore master copies and counters bit for bit, in their own dtypes; then both optimizers continue alike.

    Parameters without a master copy are saved by the model, not by the optimizer.
    """
    models = [build(torch.bfloat16) for _ in range(2)]
    first, second = (RoleOptimizer(model, TRAIN, torch.bfloat16) for model in models)
    first.set_lr(RATES)
    give_gradients(models[0], 0)
    first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    models[1].load_state_dict(
        {n: p for n, p in models[0].state_dict().items() if p.dtype == torch.float32}, strict=False
    )
    assert same_bits(first, second)
    for model, optimizer in zip(models, (first, second), strict=True):
        give_gradients(model, 1)
        optimizer.step()
    assert same_bits(first, second)


def test_state_of_other_stacks_is_refused(build: Callable[[torch.dtype], Yaongi]) -> None:
    """Check that the error is one line, and that nothing has changed."""
    saved = RoleOptimizer(build(torch.float32), Training(batch_tokens=4096, row_tokens=64, stack=1), torch.float32)
    models = [build(torch.float32) for _ in range(2)]
    optimizer, untouched = (RoleOptimizer(model, TRAIN, torch.float32) for model in models)
    with pytest.raises(ValueError, match="optimizer: stack of kind matrix must be 2, got 1"):
        optimizer.load_state_dict(saved.state_dict())
    assert same_bits(optimizer, untouched)


def test_schedulers_of_torch(build: Callable[[torch.dtype], Yaongi]) -> None:
    """Check that a step uses the learning rates that a scheduler has set in the groups."""
    models = [build(torch.float64) for _ in range(2)]
    scheduled, told = (RoleOptimizer(model, TRAIN, torch.float64) for model in models)
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 0.5**step)
    for step in range(3):
        told.set_lr({kind: rate * 0.5**step for kind, rate in told.peak_lr.items()})
        for model, optimizer in zip(models, (scheduled, told), strict=True):
            give_gradients(model, step)
            optimizer.step()
        scheduler.step()
    assert same_bits(scheduled, told)


def test_frozen_parameters(build: Callable[[torch.dtype], Yaongi]) -> None:
    """Check that they stay and have no state, and that a matrix whose partner is frozen is orthogonalised alone."""
    model = build(torch.float64)
    frozen = [f"backbone.layers.{i}.mixer.q_proj.weight" for i in (2,)] + ["lm_head.weight"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = RoleOptimizer(model, TRAIN, torch.float64)
    optimizer.set_lr(RATES)
    gradients = give_gradients(model, 0)
    for name in frozen:
        model.get_parameter(name).grad = None
    optimizer.step()
    assert not optimizer.tensors().keys() & set(frozen)
    assert all(torch.equal(model.get_parameter(name), start[name]) for name in frozen)
    partner = "backbone.layers.4.mixer.q_proj.weight"
    wanted = muon(start[partner], [gradients[partner]], [])
    torch.testing.assert_close(model.get_parameter(partner).detach(), wanted, rtol=1e-9, atol=1e-11)
