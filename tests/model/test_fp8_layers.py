"""Layers in FP8 by emulation: nodes against autograd through composed references, scales, and what is refused."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from fp8_support import EXPERTS, FP8, SIZES, composed
from model_support import packed, roughened, small_config, token_ids
from oracle import assert_equal_to_float64
from torch.nn.functional import cosine_similarity

from yaongi.model import Yaongi
from yaongi.model.layers.accumulation import fused_accumulation
from yaongi.model.layers.fp8_layers import Travelling
from yaongi.model.layers.fp8_scales import Fp8Scales

Tensor = torch.Tensor
KINDS = [
    pytest.param("M", {}, id="M"),
    pytest.param("E", {}, id="E"),
    pytest.param("E", EXPERTS, id="E with its experts"),
    pytest.param("*", {}, id="*"),
]


def model_of(
    pattern: str, dtype: torch.dtype = torch.float64, precision: dict[str, Any] | None = None, **changes: Any
) -> Yaongi:
    """A model with FP8 layers whose scales fit its numbers."""
    config = small_config(pattern, precision=FP8 | (precision or {}), **SIZES | changes)
    model = roughened(Yaongi(config, dtype=dtype))
    calibrate(model)
    return model


def calibrate(model: Yaongi) -> None:
    scales = scales_of(model)
    scales.calibrating = True
    losses = model.losses(torch.arange(32).view(2, 16))
    (losses.cross_entropy_sum + losses.balance).backward()
    scales.calibrating = False
    model.zero_grad()
    scales.discard()


def scales_of(model: Yaongi) -> Fp8Scales:
    scales = model.backbone.fp8_scales
    assert scales is not None
    return scales


def gradients(model: Yaongi, ids: Tensor, documents: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    losses = model.losses(ids, documents)
    (losses.cross_entropy_sum + losses.balance).backward()
    found = {name: p.grad.to_dense() if p.grad.is_sparse else p.grad for name, p in model.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items()}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "precision"), KINDS)
def test_a_node_is_autograd_through_its_composed_reference(kind: str, precision: dict[str, Any], fused: bool) -> None:
    """In float64, to 1e-9: the output, the balance loss, and every gradient, also added to gradients that are there."""
    model = model_of(kind, precision=precision)
    layer: Any = model.backbone.layers[0]
    documents = packed((10, 14), (24,))
    context = model.backbone.context(token_ids(model, 2, 24), documents, with_routing=True)
    hidden, dout = (torch.randn(2, 24, 32, dtype=torch.float64) for _ in range(2))
    results = []
    for run in (lambda h: layer(h, None, context), lambda h: composed(model, layer, h, context)):
        leaf = hidden.clone().requires_grad_()
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        with fused_accumulation(fused):
            out, *_, more = run(leaf)
            balance = more.balance if hasattr(more, "balance") else more
            total = (out * dout).sum() + (0 if balance is None else 3 * balance)
            total.backward()
        found = {name: p.grad for name, p in layer.named_parameters()} | {"hidden": leaf.grad, "out": out.detach()}
        results.append(found | ({} if balance is None else {"balance": balance.detach()}))
    ours, exact = results
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        assert_equal_to_float64(ours[name], value, 1e-9, name)


@pytest.mark.parametrize("pattern", ["MEM*ME", "MM", "*EM"])
def test_gradients_travel_in_fp8(pattern: str) -> None:
    """A norm's backward pass casts the gradient for the layer before: the same bits as a cast of its own."""
    model = model_of(pattern, torch.float32)
    ids = token_ids(model, 2, 24)
    taken = []

    def take(self: Travelling, gradient: Tensor, inner: Any = Travelling.take) -> Any:
        found = inner(self, gradient)
        taken.append(found is not None)
        return found

    with mock.patch.object(Travelling, "take", take):
        first = gradients(model, ids)
    assert taken == [False] + [True] * (len(pattern) - 1)
    with mock.patch.object(Travelling, "take", return_value=None):
        second = gradients(model, ids)
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


def test_a_changed_gradient_is_cast_anew() -> None:
    """Autograd adds gradients in place, or hands over another tensor."""
    travelling, gradient = Travelling(), torch.ones(4, 8)
    for change in (lambda g: g, lambda g: g.view(4, 8), lambda g: g.clone(), lambda g: g.add_(1), lambda g: g[:2]):
        kept = gradient.clone()
        travelling.put(kept, kept, kept)
        same = change(kept)
        assert (travelling.take(same) is not None) == (
            same.data_ptr() == kept.data_ptr() and len(same) == 4 and bool((same == 1).all())
        )
        assert travelling.take(kept) is None


@pytest.mark.parametrize(("kind", "precision"), KINDS)
def test_fp8_is_near_the_layer_without(kind: str, precision: dict[str, Any]) -> None:
    model, ids = model_of(kind, precision=precision), torch.arange(32).view(2, 16)
    ours = gradients(model, ids)
    scales_of(model).enabled = False
    exact = gradients(model, ids)
    for name, gradient in exact.items():
        cosine = cosine_similarity(ours[name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.97, f"{name}: {cosine}"


@pytest.mark.parametrize("recompute", ["all", (1, 3)])
def test_recomputing_changes_nothing(recompute: Any) -> None:
    model = model_of("MEM*ME", torch.float32, EXPERTS)
    ids = token_ids(model, 2, 24)
    expected, before = gradients(model, ids), scales_of(model).amax.clone()
    scales_of(model).discard()
    model.recompute = recompute
    for name, gradient in gradients(model, ids).items():
        assert torch.equal(gradient, expected[name]), name
    assert torch.equal(scales_of(model).amax, before)


def test_engram_and_layers_that_stay_high() -> None:
    """The first and last layer stay in the model's dtype; an Engram's layer is a node like the others."""
    engram = [{"layer": 2, "heads": 2, "head_dim": 4, "rows": 50}]
    model = model_of("MEM*ME", torch.float32, {"high_layers": [0, -1]}, engram=engram)
    assert {site.split()[0] for site in scales_of(model).sites} == {f"layers.{i}" for i in (1, 2, 3, 4)}
    ids = token_ids(model, 2, 24)
    ours = gradients(model, ids, packed((10, 14), (24,)))
    assert all(gradient.isfinite().all() for gradient in ours.values())
    again = gradients(model, ids, packed((10, 14), (24,)))
    assert all(torch.equal(gradient, again[name]) for name, gradient in ours.items())


def test_parameters_of_fp8_roles_are_float32_masters() -> None:
    model = Yaongi(small_config("ME*", precision=EXPERTS, **SIZES), dtype=torch.bfloat16)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32 and p.dim() > 1}
    suffixes = ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "experts.up_proj", "experts.down_proj")
    assert wide == {n for n, _ in model.named_parameters() if n.removesuffix(".weight").endswith(suffixes)}
    plain = Yaongi(small_config("ME*", **SIZES), dtype=torch.bfloat16)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.to(q.dtype), q), f"{name}: another start"
    for enabled in (True, False):
        scales_of(model).enabled = enabled
        assert model(torch.arange(16).view(1, 16)).dtype == torch.bfloat16


def test_frozen_experts_get_no_gradient() -> None:
    model = model_of("E", torch.float32, EXPERTS)
    ids, layers = token_ids(model, 2, 16), model.backbone.layers
    expected, experts = gradients(model, ids), layers[0].mixer.experts  # type: ignore[union-attr]
    experts.up_proj.requires_grad_(False)  # type: ignore[union-attr]
    model.zero_grad()
    losses = model.losses(ids)
    (losses.cross_entropy_sum + losses.balance).backward()
    assert experts.up_proj.grad is None
    for name, parameter in model.named_parameters():
        assert parameter is experts.up_proj or torch.equal(parameter.grad, expected[name]), name


def test_without_gradients_no_scale_changes_and_any_length_runs() -> None:
    model = model_of("MEM*ME", torch.float32)
    ids = token_ids(model, 1, 21)
    before = {name: t.clone() for name, t in scales_of(model).named_buffers()}
    with torch.no_grad():
        first = model(ids)
    assert all(torch.equal(t, before[name]) or name == "amax" for name, t in scales_of(model).named_buffers())
    assert torch.equal(scales_of(model).amax[:-1], before["amax"][:-1])
    scales_of(model).enabled = False
    with torch.no_grad():
        assert not torch.equal(model(ids), first)
    scales_of(model).enabled = True
    with pytest.raises(ValueError, match=r"^model: a micro-batch must be a multiple of 16 tokens for fp8, got 21$"):
        model.loss(ids)


def test_weights_are_cast_again_when_they_change() -> None:
    model = model_of("MM", torch.float32)
    ids = token_ids(model, 1, 16)
    with torch.no_grad():
        first = model(ids)
        layer: Any = model.backbone.layers[1]
        place = layer.fp8._layer.first.w8.data_ptr()
        layer.mixer.in_proj.weight.mul_(2)
        assert not torch.equal(model(ids), first)
        assert layer.fp8._layer.first.w8.data_ptr() == place


def test_scales_follow_the_history() -> None:
    """Powers of two with room for four times the largest value of the last steps; skipped steps change nothing."""
    scales = Fp8Scales(["a x", "b x", "c x"], margin=4.0, history=3, device=None)
    for largest, wanted in ((7.0, 16.0), (1.0, 16.0), (2.0, 16.0), (1.0, 32.0), (1.0, 32.0), (1.0, 64.0)):
        scales.amax[:3] = torch.tensor([largest, 0.0, 28.0])
        scales.advance()
        assert scales.scale.tolist() == [wanted, 1.0, 4.0]
        assert torch.equal(scales.unit[:, 0] * scales.scale, torch.ones(3))
        assert not scales.amax.any()
    before = scales.history.clone(), scales.scale.clone()
    scales.amax[1] = torch.inf
    assert scales.bad_site() == "b x"
    assert not scales.measures().isfinite().all()
    scales.discard()
    assert torch.equal(scales.history, before[0])
    assert torch.equal(scales.scale, before[1])
    for _ in range(5):  # a site of zeros keeps the scale it had
        scales.amax[:3] = torch.tensor([0.0, 0.0, 0.0])
        scales.advance()
    assert scales.scale.tolist() == [64.0, 1.0, 4.0]


def test_calibration_makes_the_first_scales() -> None:
    """Each producer runs twice: no cast saturates, and scales are what the history would have made."""
    model = model_of("MEM*ME", torch.float32, EXPERTS)
    scales = scales_of(model)
    ids = torch.arange(32).view(2, 16)
    with scales.first_micro_batch():
        calibrated = gradients(model, ids)
    made = scales.scale.clone()
    for name, gradient in gradients(model, ids).items():  # nothing is added twice
        assert torch.equal(gradient, calibrated[name]), name
    assert (scales.amax[:-1] * scales.scale <= 448 / 4).all()
    scales.advance()
    assert torch.equal(scales.scale, made)


def test_a_copy_has_casts_and_scales_of_its_own() -> None:
    model = model_of("MEM*ME", torch.float32)
    ids = token_ids(model, 2, 16)
    expected = gradients(model, ids)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    scales_of(model).scale.fill_(1.0)
    for name, gradient in gradients(other, ids).items():
        assert torch.equal(gradient, expected[name]), name


def test_a_hooked_or_replaced_mixer_is_refused() -> None:
    model: Any = model_of("MM", torch.float32)
    hook = model.backbone.layers[1].mixer.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match=r"^model: the mixer, where a layer runs in fp8, must be the model's own Mamba2"
    ):
        model(token_ids(model, 1, 16))
    hook.remove()
    model.backbone.layers[1].mixer = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"^model: the mixer, where a layer runs in fp8, must be .*, got Identity$"):
        model(token_ids(model, 1, 16))


def test_a_replaced_projection_is_refused() -> None:
    model = model_of("MM", torch.float32)
    model.backbone.layers[1].mixer.out_proj = torch.nn.Linear(32, 32, bias=False)  # type: ignore[union-attr]
    with pytest.raises(
        ValueError, match=r"^model: out_proj, where a layer runs in fp8, must be the model's own Linear"
    ):
        model(token_ids(model, 1, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 24}, "linear: sizes must be multiples of 16 for fp8, got 24 and 32"),
        ({"shared_expert_size": 20}, "linear: sizes must be multiples of 16 for fp8, got 32 and 20"),
        ({"precision": FP8 | {"margin": 0.5}}, "precision: margin must be 1 or more, got 0.5"),
        ({"precision": FP8 | {"high_layers": [7]}}, "precision: high_layers must be layers of -6 to 5, got (7,)"),
        ({"expert_size": 40, "precision": EXPERTS}, "linear: sizes must be multiples of 16 for fp8, got 32 and 40"),
        ({"precision": {"experts": "fp8"}}, "precision: experts must be bf16 where shared_experts is, got fp8"),
        ({"precision": {"router": "fp8"}}, "precision: keys must be among mamba_projections, "),
        ({"precision": {"shared_experts": "int8"}}, "precision: shared_experts must be one of bf16, fp8, got 'int8'"),
    ],
)
def test_bad_precisions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^\w+: .*") as caught:
        small_config("MEM*ME", **{"precision": FP8, **SIZES} | changes)
    assert str(caught.value).startswith(message)


def test_a_saved_model_has_no_precision(tmp_path: Any) -> None:
    """FP8 belongs to a training: folders hold casts of the float32 weights in the model's dtype."""
    model = Yaongi(small_config("ME*", precision=FP8, **SIZES), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = Yaongi.from_pretrained(tmp_path, dtype=None)
    assert loaded.config.precision.roles == ()
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert q.dtype == (torch.float32 if name.endswith((".A_log", ".D", ".dt_bias")) else torch.bfloat16), name
        assert torch.equal(p.to(q.dtype), q), name
