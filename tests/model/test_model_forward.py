"""The complete model: documents, causality, losses, recomputation, init, roles, and float64 finite differences."""

from collections.abc import Callable

import pytest
import torch
from model_support import ENGRAM, assert_relative, gradients, packed, small_config, small_model, token_ids
from torch.nn import functional as F

from yaongi.model import Yaongi, load_preset
from yaongi.model.initialize import initialize, set_constants
from yaongi.model.layers.accumulation import fused_accumulation
from yaongi.model.losses import NO_TARGET, head_cross_entropy, next_tokens
from yaongi.train.optimizer.roles import parameter_roles

WITH_ENGRAM = {"engram": [ENGRAM]}
KINDS = {"M": {}, "E": {}, "*": {}, "EE": WITH_ENGRAM, "MEM*ME": WITH_ENGRAM}


@pytest.mark.parametrize("pattern", KINDS)
def test_a_packed_row_is_its_documents_alone(pattern: str) -> None:
    """Check that attention, Mamba state, both convolutions and n-grams start from scratch at each document."""
    model = small_model(pattern, torch.float64, **KINDS[pattern])
    lengths = ((1, 9, 2, 20), (13, 1, 1, 17))
    ids, documents = token_ids(model, 2, 32), packed(*lengths)
    together = model(ids, documents)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            part = slice(start, start + length)
            assert_relative(together[row : row + 1, part], model(ids[row : row + 1, part]), 1e-10)
            start += length


@pytest.mark.parametrize("pattern", KINDS)
def test_no_output_depends_on_a_later_token(pattern: str) -> None:
    model = small_model(pattern, torch.float64, **KINDS[pattern])
    ids = token_ids(model, 2, 24)
    for place in (0, 7, 23):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % model.config.vocab_size
        change = (model(ids) - model(other)).abs().amax((0, 2))
        assert (change[:place] < 1e-12).all(), f"token {place} changes an earlier output"
        assert change[place] > 1e-6


@pytest.mark.parametrize("gate", ["paper", "demo"])
def test_float64_finite_differences_through_the_whole_model(gate: str) -> None:
    """Check them along a random direction of all parameters at once, and of each alone."""
    engram = {"layer": 1, "heads": 2, "head_dim": 4, "rows": 20, "orders": [2, 3], "gate": gate}
    model = small_model("MEM*E", torch.float64, engram=[engram])
    ids, documents = token_ids(model, 2, 12), packed((5, 7), (12,))

    def loss() -> torch.Tensor:
        losses = model.losses(ids, documents)
        return losses.cross_entropy_sum / losses.targets + 0.1 * losses.balance + 1e-3 * losses.z_sum

    grads = gradients(model, loss())
    parameters = dict(model.named_parameters())
    assert grads.keys() == parameters.keys()
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    for names in (list(parameters), *([name] for name in parameters)):
        expected = sum(float((grads[name] * directions[name]).sum()) for name in names)
        step, values = 1e-6, []
        with torch.no_grad():
            for sign in (1, -2, 1):
                for name in names:
                    parameters[name].add_(directions[name], alpha=sign * step)
                values.append(float(loss()))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=2e-5, abs=1e-8), names


def test_losses_are_those_of_plain_torch() -> None:
    model = small_model(dtype=torch.float64, **WITH_ENGRAM)
    ids, documents = token_ids(model, 3, 20), packed((20,), (3, 17), (1, 1, 18))
    logits = model(ids, documents)
    same = documents[:, 1:] == documents[:, :-1]
    picked, targets = logits[:, :-1][same], ids[:, 1:][same]
    wanted = F.cross_entropy(picked, targets, reduction="sum")
    losses = model.losses(ids, documents)
    assert int(losses.targets) == int(same.sum()) == 54
    assert_relative(losses.cross_entropy_sum, wanted, 1e-12)
    assert_relative(losses.z_sum, picked.logsumexp(-1).square().sum(), 1e-12)
    assert_relative(model.loss(ids, documents), wanted / 54, 1e-12)
    assert losses.loads.dtype == torch.int32
    assert losses.loads.shape == (2, 6)
    assert losses.loads.sum(1).tolist() == [120, 120]
    alone = small_model("M*").losses(token_ids(model, 2, 5))
    assert (float(alone.balance), tuple(alone.loads.shape)) == (0, (0, 6))


def test_a_row_without_targets_has_loss_zero() -> None:
    model = small_model()
    documents = torch.arange(6, dtype=torch.int32)[None]
    loss = model.loss(token_ids(model, 1, 6), documents)
    assert loss.item() == 0
    assert all(float(g.abs().max()) == 0 for g in gradients(model, loss).values())


@pytest.mark.parametrize("no_target", [NO_TARGET, -100])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_cross_entropy_and_its_gradients(chunk: int, no_target: int) -> None:
    hidden = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 17, (30,))
    targets[::4] = no_target
    total, squares = head_cross_entropy(hidden, weight, targets, chunk)
    found = torch.autograd.grad(total + 0.3 * squares, [hidden, weight])
    logits = (hidden @ weight.T)[targets >= 0]
    plain = F.cross_entropy(logits, targets[targets >= 0], reduction="sum")
    exact = torch.autograd.grad(plain + 0.3 * logits.logsumexp(-1).square().sum(), [hidden, weight])
    assert_relative(total, plain, 1e-12)
    for got, wanted in zip(found, exact, strict=True):
        assert_relative(got, wanted, 1e-12)


@pytest.mark.parametrize("accumulated", [False, True])
def test_gradients_formed_with_the_loss_are_those_of_the_backward_pass(accumulated: bool) -> None:
    hidden = torch.randn(30, 8, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(17, 8))
    targets = torch.randint(-5, 17, (30,))
    upstream = torch.tensor(0.2), torch.tensor(0.06)

    def gradients(told: tuple[torch.Tensor, torch.Tensor] | None) -> list[torch.Tensor]:
        hidden.grad, weight.grad = None, torch.ones(17, 8) if accumulated else None
        with fused_accumulation(accumulated):
            total, squares = head_cross_entropy(hidden, weight, targets, 7, told)
            (total * upstream[0] + squares * upstream[1]).backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return [total, squares, hidden.grad, weight.grad]

    for got, wanted in zip(gradients(upstream), gradients(None), strict=True):
        assert torch.equal(got, wanted)
    assert gradients((upstream[0], 2 * upstream[1]))[2].isnan().all()
    with torch.no_grad():
        head_cross_entropy(hidden, weight, targets, 7, upstream)


def test_next_tokens_stay_in_their_document() -> None:
    ids = torch.tensor([[4, 5, 6, 7]])
    assert next_tokens(ids, None).tolist() == [[5, 6, 7, NO_TARGET]]
    assert next_tokens(ids, packed((2, 2))).tolist() == [[5, NO_TARGET, 7, NO_TARGET]]


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_gradients_in_place(recompute: str) -> None:
    """Add up two passes in the first pass's gradients, bit for bit as autograd; the table's gradient becomes dense."""
    model, other = (small_model("MEM*ME", **WITH_ENGRAM) for _ in range(2))
    model.recompute = recompute
    batches = [token_ids(model, 2, 9) for _ in range(2)]
    model.loss(batches[0]).backward()
    held = {name: p.grad for name, p in model.named_parameters()}
    with fused_accumulation():
        model.loss(batches[1]).backward()
    for batch in batches:
        other.loss(batch).backward()
    for name, parameter in other.named_parameters():
        found = model.get_parameter(name).grad
        if name.endswith("table.weight"):
            assert not found.is_sparse
            torch.testing.assert_close(found, parameter.grad.to_dense())
        else:
            assert found is held[name], name
            assert torch.equal(found, parameter.grad), name


@pytest.mark.parametrize("recompute", ["all", [0, 2, 3]])
def test_recomputation_changes_no_bit(recompute: str | list[int]) -> None:
    model = small_model(**WITH_ENGRAM)
    ids, documents = token_ids(model, 2, 20), packed((8, 12), (20,))
    kept = gradients(model, model.losses(ids, documents).cross_entropy_sum)
    model.recompute = recompute
    again = gradients(model, model.losses(ids, documents).cross_entropy_sum)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_all_targets_ignored_is_a_loss_of_zero() -> None:
    hidden = torch.randn(6, 8, requires_grad=True)
    total, squares = head_cross_entropy(hidden, torch.randn(17, 8), torch.full((6,), -100))
    (dhidden,) = torch.autograd.grad(total + squares, hidden)
    assert (float(total), float(squares), float(dhidden.abs().max())) == (0, 0, 0)


@pytest.mark.parametrize("narrow", [torch.nn.Module.bfloat16, torch.nn.Module.half, lambda m: m.to(torch.bfloat16)])
def test_what_must_stay_wide_does(narrow: Callable[[Yaongi], Yaongi]) -> None:
    """A step of 1e-3 on a decay or a bias of 0.5 is lost in bfloat16."""
    wide = ("A_log", "mixer.D", "dt_bias", "e_score_correction_bias")
    model = small_model("ME*")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    (model.backbone.layers[0].mixer.A_log.sum() + model.lm_head.weight.sum()).backward()
    narrow(model)
    for name, tensor in model.state_dict().items():
        if name.endswith(wide):
            assert tensor.dtype == before[name].dtype == torch.float32, name
            assert torch.equal(tensor, before[name]), name
        else:
            assert not tensor.is_floating_point() or tensor.dtype.itemsize == 2, name


@pytest.mark.parametrize("how", ["float64", "inference mode", "three threads"])
def test_init_does_not_depend_on_the_process(how: str) -> None:
    plain = Yaongi(small_config("ME*"), dtype=torch.float32).state_dict()
    threads = torch.get_num_threads()
    try:
        torch.set_default_dtype(torch.float64 if how == "float64" else torch.float32)
        torch.set_num_threads(3 if how == "three threads" else threads)
        with torch.inference_mode(how == "inference mode"):
            model = Yaongi(small_config("ME*"), dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain[name]), name


def test_init_is_seeded_by_name_and_as_specified() -> None:
    config = load_preset("yaongi-tiny", vocab_size=512)
    first, second, other = Yaongi(config, seed=3), Yaongi(config, seed=3, dtype=torch.bfloat16), Yaongi(config, seed=4)
    state = {name: p.detach() for name, p in first.named_parameters()}
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, state[name].to(parameter.dtype)), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    std = (0.8 / 128) ** 0.5
    assert state["lm_head.weight"].std() == pytest.approx(std, rel=0.02)
    assert state["backbone.layers.0.mixer.in_proj.weight"].std() == pytest.approx(std, rel=0.02)
    for name in ("0.mixer.out_proj.weight", "1.mixer.experts.down_proj", "3.mixer.o_proj.weight"):
        assert state[f"backbone.layers.{name}"].std() == pytest.approx(std / 6**0.5, rel=0.03)
    a = state["backbone.layers.0.mixer.A_log"].exp()
    dt = F.softplus(state["backbone.layers.0.mixer.dt_bias"])
    assert 1 <= a.min() <= a.max() <= 16
    assert 9.9e-4 <= dt.min() <= dt.max() <= 0.101
    assert (state["backbone.layers.0.mixer.D"] == 1).all()
    assert (state["backbone.layers.2.engram.conv.weight"] == 0).all()


def test_meta_device_draws_nothing_and_can_be_filled() -> None:
    config = small_config(**WITH_ENGRAM)
    with torch.device("meta"):
        model = Yaongi(config, seed=5)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    initialize(model, config, 5)
    set_constants(model)
    expected = Yaongi(config, seed=5)
    ids = token_ids(model, 1, 9)
    assert torch.equal(model(ids), expected(ids))


def test_narrow_models_keep_what_must_stay_wide() -> None:
    model = Yaongi(small_config(), dtype=torch.bfloat16)
    wide = {name for name, t in model.state_dict().items() if t.dtype == torch.float32}
    assert {name.rsplit(".", 1)[-1] for name in wide} == {"A_log", "D", "dt_bias", "e_score_correction_bias"}
    loss = model.loss(token_ids(model, 2, 9))
    assert loss.dtype == torch.float32
    loss.backward()


def test_roles_are_those_of_the_specification() -> None:
    model = Yaongi(small_config("ME**ME*", **WITH_ENGRAM), device="meta")
    roles = parameter_roles(model)
    assert list(roles) == [name for name, _ in model.named_parameters()]
    q = roles["backbone.layers.6.mixer.q_proj.weight"]
    assert (q.kind, q.part, q.layer, q.decay) == ("qkv", "q", 6, True)
    splits = roles["backbone.layers.0.mixer.in_proj.weight"].splits
    assert [(s.name, s.start, s.stop, s.kind, s.decay) for s in splits] == [
        ("z", 0, 24, "muon", True),
        ("x", 24, 48, "muon", True),
        ("B", 48, 58, "muon", True),
        ("C", 58, 68, "muon", True),
        ("dt", 68, 72, "adamw", False),
    ]
    kinds = {kind: {r.part for r in roles.values() if r.kind == kind} for kind in ("muon", "expert", "table", "qkv")}
    assert kinds["qkv"] == {"q", "k", "v"}
    assert kinds["expert"] == {"mixer.experts.up_proj", "mixer.experts.down_proj"}
    assert kinds["table"] == {"engram.table.weight"}
    assert kinds["muon"] == {
        "mixer.in_proj.weight",
        "mixer.out_proj.weight",
        "mixer.o_proj.weight",
        "mixer.shared_experts.up_proj.weight",
        "mixer.shared_experts.down_proj.weight",
        "engram.key_proj.weight",
        "engram.value_proj.weight",
    }
    decayed = {r.part for r in roles.values() if r.kind == "adamw" and r.decay}
    assert decayed == {"backbone.embeddings.weight", "lm_head.weight", "mixer.gate.weight"}


def test_bad_tokens_are_one_line() -> None:
    model = small_model()
    good = token_ids(model, 2, 6)
    for ids, documents, error, message in (
        (good.float(), None, TypeError, "model: input_ids must be int64 or int32, got float32"),
        (good[0], None, ValueError, r"model: input_ids must be \(B, L\) with B, L >= 1, got \(6,\)"),
        (good[:, :0], None, ValueError, r"model: input_ids must be \(B, L\) with B, L >= 1, got \(2, 0\)"),
        (good + 61, None, ValueError, "model: token ids must be 0 to 60, got"),
        (good - 61, None, ValueError, "model: token ids must be 0 to 60, got -"),
        (good, good, TypeError, "model: document_ids must be int32, got int64"),
        (good, good[:, 1:].int(), ValueError, r"model: document_ids must be \(2, 6\) like input_ids, got \(2, 5\)"),
    ):
        with pytest.raises(error, match=message):
            model(ids, documents)
    assert torch.equal(model(good), model(good.int()))


@pytest.mark.long
def test_yaongi_tiny_is_fast_enough_here() -> None:
    """Run forward and backward at 2,000 tokens/s or more, on one core, measured in processor time."""
    from time import process_time

    model = Yaongi(load_preset("yaongi-tiny"))
    ids, documents = token_ids(model, 4, 512), packed(*([(100, 412)] * 4))
    best = 0.0
    for _ in range(4):
        start = process_time()
        model.loss(ids, documents).backward()
        best = max(best, ids.numel() / (process_time() - start))
    assert best >= 2000, f"{best:.0f} tokens/s"
