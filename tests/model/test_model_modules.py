"""Modules are modules: what is put in a layer's place, or hooked onto it, counts in every way to run the model.

Where the model's kernels read a module's weights directly, so that nothing could count, it is refused in one line.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_support import ENGRAM, roughened, small_config
from oracle import assert_equal_to_float64
from torch import nn

from yaongi.kernels import cross_entropy
from yaongi.model import Yaongi
from yaongi.model.decoding import prefill, step
from yaongi.model.losses import next_tokens

Tensor = torch.Tensor
REFUSED = ("conv1d", "mixer.experts", "engram.conv")  # how the names of modules end that are only weights
LENGTH, PROMPT = 17, 9


def fresh_model() -> Yaongi:
    """Return a model with every kind of layer, whose heads of Mamba-2 form two groups."""
    return roughened(Yaongi(small_config("MEM*", engram=[ENGRAM])))


def called_modules() -> list[str]:
    """Return the names of all modules that have weights or children, but for lists and the model itself."""
    return [name for name, module in fresh_model().named_modules() if name and not isinstance(module, nn.ModuleList)]


def ways(model: Yaongi) -> dict[str, Callable[[Tensor], Any]]:
    """Return every way to run the model on ids (B, L)."""

    def generated(ids: Tensor) -> Tensor:
        logits, cache = prefill(model, ids[:, :PROMPT], capacity=LENGTH)
        return torch.stack([logits, *(step(model, ids[:, place], cache) for place in range(PROMPT, LENGTH))], dim=1)

    return {"forward": model, "loss": model.loss, "losses": model.losses, "generated": generated}


def assert_consistent(model: Yaongi) -> Tensor:
    """Check that the losses and the generation agree with the forward pass, and return its logits."""
    ids = torch.randint(0, 61, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    run = ways(model)
    with torch.no_grad():
        logits = run["forward"](ids)
        targets = next_tokens(ids, None)
        losses, normalizers = cross_entropy(logits.flatten(0, 1), targets.flatten())
        squares = torch.where(targets.flatten() < 0, 0, normalizers.square()).sum()
        assert_equal_to_float64(run["loss"](ids), losses.sum() / (targets >= 0).sum(), 1e-5, "loss")
        sums = run["losses"](ids)
        assert_equal_to_float64(sums.cross_entropy_sum, losses.sum(), 1e-5, "losses")
        assert_equal_to_float64(sums.z_sum, squares, 1e-5, "z")
        assert_equal_to_float64(run["generated"](ids), logits[:, PROMPT - 1 :], 1e-5, "generated")
    return logits


def doubled(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Double a module's output, or the first of its outputs: a forward hook."""
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


@pytest.mark.parametrize("name", called_modules())
def test_a_hook_counts_everywhere_or_is_refused(name: str) -> None:
    model = fresh_model()
    before = assert_consistent(model)
    model.get_submodule(name).register_forward_hook(doubled)
    if name.endswith(REFUSED):
        for run in ways(model).values():
            with pytest.raises(ValueError, match=r"^model: [\w.]+ must be the model's own \w+ without hooks, got a ho"):
                run(torch.ones(1, LENGTH, dtype=torch.int64))
        return
    assert not torch.equal(assert_consistent(model), before), name


class Adapter(nn.Module):
    """A low-rank addition to a projection, as people write it: it knows the projection only as a module."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(inputs, 2, bias=False)
        self.up = nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the product of two small matrices."""
        return self.base(x) + self.up(self.down(x))


def projections() -> list[str]:
    """Return the names of the model's `nn.Linear`s, which adapters and quantisers look for."""
    return [name for name, module in fresh_model().named_modules() if isinstance(module, nn.Linear)]


def test_every_projection_is_a_linear_for_other_tools() -> None:
    kinds = {name.rsplit(".", 1)[1] for name in projections() if "." in name} | {"lm_head"}
    attention, expert = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"up_proj", "down_proj"}
    assert kinds == attention | expert | {"in_proj", "out_proj", "key_proj", "value_proj", "lm_head"}
    assert isinstance(fresh_model().backbone.embeddings, nn.Embedding)


@pytest.mark.parametrize("name", projections())
def test_an_adapter_counts_everywhere_and_learns(name: str) -> None:
    model = fresh_model()
    before = assert_consistent(model)
    base: Any = model.get_submodule(name)
    adapter = Adapter(base, base.in_features, base.out_features)
    model.set_submodule(name, adapter)
    assert not torch.equal(assert_consistent(model), before), name
    model.loss(torch.arange(LENGTH)[None]).backward()
    assert adapter.down.weight.grad is not None
    assert adapter.down.weight.grad.abs().max() > 0
    assert base.weight.grad is not None
    with pytest.raises(ValueError, match=r"^save_pretrained: tensors must be those of the config, got the extra "):
        model.save_pretrained("nowhere")


class Wrapped(nn.Module):
    """A module around another one, which passes everything on and scales the (first) output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> Any:
        """Run the inner module."""
        return doubled(self, args, self.inner(*args, **options))


@pytest.mark.parametrize("name", called_modules())
def test_another_module_counts_everywhere_or_is_refused(name: str) -> None:
    model = fresh_model()
    before = assert_consistent(model)
    wrapped = Wrapped(model.get_submodule(name))
    if name.endswith(REFUSED):
        model.set_submodule(name, wrapped)
        for run in ways(model).values():
            with pytest.raises(ValueError, match=r"^model: [\w.]+ must be the model's own \w+ without hooks, got Wrap"):
                run(torch.ones(1, LENGTH, dtype=torch.int64))
    elif name.endswith("gate"):
        model.set_submodule(name, wrapped)
        with pytest.raises(ValueError, match=r"^model: gate must have e_score_correction_bias, got a Wrapped without"):
            model(torch.ones(1, LENGTH, dtype=torch.int64))
        wrapped.e_score_correction_bias = wrapped.inner.e_score_correction_bias
        assert not torch.equal(assert_consistent(model), before)
    elif name != "backbone":  # of which the model needs more than a call
        model.set_submodule(name, wrapped)
        assert not torch.equal(assert_consistent(model), before), name


def test_a_forward_put_on_the_module_itself_counts() -> None:
    """Replace `forward` on the instance, as tools that offload weights do."""
    model = fresh_model()
    before = assert_consistent(model)
    for name in ("lm_head", "backbone.layers.3.mixer.q_proj", "backbone.layers.2.norm"):
        module = model.get_submodule(name)
        module.forward = lambda *args, old=module.forward: 2 * old(*args)  # type: ignore[method-assign]
        after = assert_consistent(model)
        assert not torch.equal(after, before), name
        before = after


def test_the_routers_bias_is_updated_inside_a_wrapped_mixer() -> None:
    model = fresh_model()
    mixer = model.backbone.layers[1].mixer
    bias = mixer.gate.e_score_correction_bias.clone()
    model.backbone.layers[1].mixer = Wrapped(mixer)
    model.update_router_bias(model.losses(torch.arange(LENGTH)[None]).loads)
    assert not torch.equal(mixer.gate.e_score_correction_bias, bias)
