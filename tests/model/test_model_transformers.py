"""The oracle: Hugging Face's `NemotronHForCausalLM` gives the same logits and gradients, in both directions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import ENGRAM, small_model, token_ids
from oracle import assert_equal_to_float64
from transformers import AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM

from yaongi.model import Yaongi
from yaongi.model.generation import generate

LOGITS, GRADIENTS = 2e-5, 2e-4  # relative, float32
CASES: dict[str, dict[str, Any]] = {
    "mamba": {"pattern": "M"},
    "one group": {"pattern": "MM", "mamba_groups": 1},
    "a group a head": {"pattern": "MM", "mamba_groups": 4},
    "experts": {"pattern": "EE"},
    "one expert a token": {"pattern": "E", "experts_per_token": 1},
    "all experts": {"pattern": "E", "experts_per_token": 6},
    "attention": {"pattern": "**"},
    "a key a query": {"pattern": "*", "attention_kv_heads": 4},
    "one key": {"pattern": "*", "attention_kv_heads": 1},
    "hybrid": {"pattern": "MEM*ME"},
    "other order": {"pattern": "*EMEM", "mamba_groups": 1, "experts_per_token": 1, "mamba_conv": 3, "norm_eps": 1e-3},
}
cases = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)


def our_model(**changes: Any) -> Yaongi:
    """Return a small model whose expert matrices have rows of a multiple of 16 bytes, as transformers requires."""
    return small_model(expert_size=16, **changes)


def without_clamp(model: NemotronHForCausalLM) -> NemotronHForCausalLM:
    """Remove the lower limit of dt, which transformers applies in the prefill but not in decoding."""
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model


def theirs_from(folder: Path) -> NemotronHForCausalLM:
    """Load the folder as a transformers model; it must hold exactly that model's tensors."""
    model, report = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return without_clamp(model)


def theirs(changes: dict[str, Any], folder: Path) -> NemotronHForCausalLM:
    """Return a model made by transformers, with values other than its initial ones."""
    our_model(**changes).save_pretrained(folder)
    model = without_clamp(NemotronHForCausalLM(NemotronHConfig.from_pretrained(folder))).float().eval()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.2, 0.2, generator=random)
            elif name.endswith(("A_log", "dt_bias")):
                tensor.uniform_(-2, 1, generator=random)
            elif tensor.dim() > 1:
                tensor.normal_(0, 0.15, generator=random)
            else:
                tensor.uniform_(0.5, 1.5, generator=random)
    return model


def assert_same(ours: Yaongi, other: NemotronHForCausalLM) -> None:
    """Check for equal logits and equal gradients of every parameter."""
    input_ids = token_ids(ours, 2, 149)  # longer than a chunk of transformers' scan
    logits, expected = ours(input_ids), other(input_ids, use_cache=False).logits
    assert_equal_to_float64(logits, expected, LOGITS, "logits")
    weights = torch.randn(logits.shape)
    for output in (logits, expected):
        (output * weights).sum().backward()
    gradients = {name.replace("model.", "backbone.", 1): p.grad for name, p in other.named_parameters()}
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == gradients.keys()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        if ours.config.experts_per_token == 1 and name.endswith("mixer.gate.weight"):
            # a single expert has weight 2.5 for any score: the true gradient is zero, and both compute rounding errors
            assert max(parameter.grad.abs().max(), gradients[name].abs().max()) <= 1e-5
        else:
            assert_equal_to_float64(parameter.grad, gradients[name], GRADIENTS, name)


@cases
def test_what_we_export_they_load(changes: dict[str, Any], tmp_path: Path) -> None:
    ours = our_model(**changes)
    ours.save_pretrained(tmp_path)
    assert_same(ours, theirs_from(tmp_path))


@cases
def test_what_they_save_we_load(changes: dict[str, Any], tmp_path: Path) -> None:
    other = theirs(changes, tmp_path / "config")
    other.save_pretrained(tmp_path / "theirs")
    saved = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "layers_block_type" in saved
    assert "hybrid_override_pattern" not in saved
    assert_same(Yaongi.from_pretrained(tmp_path / "theirs"), other)


def test_there_and_back_is_bit_for_bit(tmp_path: Path) -> None:
    ours = our_model()
    ours.save_pretrained(tmp_path / "ours")
    theirs_from(tmp_path / "ours").save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    back = Yaongi.from_pretrained(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_a_time_step_below_their_limit_is_not_clamped(tmp_path: Path) -> None:
    """Export a model whose dt is far below 1e-3: transformers gives the same logits, without `without_clamp`."""
    ours = our_model(pattern="MM*")
    with torch.no_grad():
        for layer in ours.backbone.layers[:2]:
            layer.mixer.dt_bias.fill_(-12)  # softplus about 6e-6
    ours.save_pretrained(tmp_path)
    other, input_ids = NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), token_ids(ours, 2, 37)
    with torch.no_grad():
        assert_equal_to_float64(ours(input_ids), other(input_ids).logits, LOGITS)


def test_greedy_text_is_the_same(tmp_path: Path) -> None:
    ours = our_model()
    prompt = torch.tensor([[30, 25, 31, 0, 57, 29, 4, 42, 40]])
    ours.save_pretrained(tmp_path)
    other = theirs_from(tmp_path)
    visible = torch.ones_like(prompt)  # else transformers would mask the pad id, which is among these tokens
    expected = other.generate(prompt, attention_mask=visible, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert generate(ours, prompt.tolist(), max_new_tokens=12, stop=()) == expected[:, 9:].tolist()


def test_our_own_type_loads_with_remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    ours = our_model(engram=[ENGRAM])
    input_ids = token_ids(ours, 2, 37)
    ours.save_pretrained(tmp_path / "ours")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(other(input_ids).logits, ours(input_ids))
    assert other.generate(input_ids, max_new_tokens=5).shape[0] == 2
