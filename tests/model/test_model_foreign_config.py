"""Every field of transformers' `nemotron_h` config, in one list: honoured, refused by name, or without effect."""

import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import ENGRAM, roughened, small_config, small_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM, NemotronHConfig

from yaongi.model import Yaongi
from yaongi.model.hub.config_json import config_from_json, nemotron_h_config

HONOURED: dict[str, tuple[Any, str, Any]] = {  # field: (a foreign value, our field, its value)
    "vocab_size": (71, "vocab_size", 71),
    "hidden_size": (32, "hidden_size", 32),
    "layers_block_type": (["moe", "linear_attention"], "pattern", "EM"),
    "pad_token_id": (5, "pad_token_id", 5),
    "bos_token_id": (6, "bos_token_id", 6),
    "eos_token_id": ([7, 8], "answer_ends", [7, 8]),
    "num_attention_heads": (8, "attention_heads", 8),
    "num_key_value_heads": (4, "attention_kv_heads", 4),
    "head_dim": (16, "attention_head_dim", 16),
    "max_position_embeddings": (99, "max_sequence_length", 99),
    "ssm_state_size": (7, "mamba_state", 7),
    "mamba_num_heads": (8, "mamba_heads", 8),
    "mamba_head_dim": (9, "mamba_head_dim", 9),
    "n_groups": (4, "mamba_groups", 4),
    "conv_kernel": (3, "mamba_conv", 3),
    "n_routed_experts": (9, "experts", 9),
    "moe_intermediate_size": (11, "expert_size", 11),
    "moe_shared_expert_intermediate_size": (13, "shared_expert_size", 13),
    "num_experts_per_tok": (3, "experts_per_token", 3),
    "routed_scaling_factor": (1.5, "routed_scale", 1.5),
    "layer_norm_epsilon": (1e-3, "norm_eps", 1e-3),
    # Older names, which transformers takes before the present ones.
    "hybrid_override_pattern": ("ME*", "pattern", "ME*"),
    "mamba_n_groups": (4, "mamba_groups", 4),
    "mamba_d_conv": (3, "mamba_conv", 3),
    "num_local_experts": (9, "experts", 9),
    "layer_types": (["moe", "full_attention"], "pattern", "E*"),
}
REFUSED: dict[str, Any] = {  # field: a value that changes the mathematics
    "tie_word_embeddings": True,
    "attention_bias": True,
    "attention_dropout": 0.1,
    "sliding_window": 128,
    "mlp_hidden_act": "silu",
    "mlp_bias": True,
    "mamba_hidden_act": "relu",
    "use_conv_bias": False,
    "mamba_conv_bias": False,
    "mamba_proj_bias": True,
    "use_bias": True,
    "n_shared_experts": 2,
    "moe_latent_size": 64,
    "n_group": 2,
    "topk_group": 2,
    "norm_topk_prob": False,
    "hidden_dropout": 0.1,
    "time_step_limit": [0.001, math.inf],
    "mamba_dt_limit": [0.0, 0.1],
    # Not in this config class, but in configs.
    "quantization_config": {"quant_method": "fp8"},
    "per_layer_config": {"0": {"head_dim": 16}},
    "norm_eps": 1e-3,
}
WITHOUT_EFFECT = {  # on what the model computes from its weights
    "use_cache": "whether generation keeps states",
    "num_logits_to_keep": "which logits generation computes",
    "intermediate_size": "of mlp layers, which are refused",
    "use_mamba_kernels": "nothing, says transformers",
    "expand": "nothing: heads times head_dim is the width",
    "chunk_size": "how the scan is computed",
    "mamba_chunk_size": "the same",
    "mamba_expand": "nothing",
    "mamba_ssm_cache_dtype": "rounding of the state in generation",
    "moe_shared_expert_overlap": "when the shared expert is computed",
    "output_router_logits": "what else is returned",
    "residual_in_fp32": "nothing in transformers",
    "rescale_prenorm_residual": "initial weights",
    "initializer_range": "initial weights",
    "time_step_max": "initial weights",
    "time_step_floor": "initial weights",
    "mamba_dt_max": "initial weights",
    "mamba_dt_init_floor": "initial weights",
    "time_step_min": "initial weights; a clamp in transformers' prefill, but neither in its decoding nor in training",
    "mamba_dt_min": "the same",
    "num_nextn_predict_layers": "a head for speculation, which is left out",
    "mtp_layers_block_type": "the same",
    "mtp_hybrid_override_pattern": "the same",
}


def fields_of(**changes: Any) -> dict[str, Any]:
    """Return a foreign config.json with changes."""
    fields = nemotron_h_config(small_config(), "float32") | changes
    if set(changes) & {"layers_block_type", "layer_types"}:
        del fields["hybrid_override_pattern"]
    return fields


def test_the_list_is_whole() -> None:
    """Read from transformers' class: its own fields, the names it maps to them, and those that it takes for them."""
    older = re.findall(r'"(\w+)" in kwargs', inspect.getsource(NemotronHConfig))
    assert len(older) >= 10
    wanted = {*NemotronHConfig.__annotations__, *NemotronHConfig.attribute_map, *older}
    listed = [*HONOURED, *REFUSED, *WITHOUT_EFFECT]
    assert len(listed) == len(set(listed))
    assert wanted - set(listed) == set()


@pytest.mark.parametrize("name", HONOURED)
def test_a_field_is_honoured(name: str) -> None:
    value, ours, wanted = HONOURED[name]
    assert getattr(config_from_json(fields_of(**{name: value})), ours) == wanted


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_is_refused_by_name(name: str) -> None:
    now = {"mamba_conv_bias": "use_conv_bias", "mamba_dt_limit": "time_step_limit"}.get(name, name)
    with pytest.raises(ValueError, match=rf"^config.json: {now} must be .*, got "):
        config_from_json(fields_of(**{name: REFUSED[name]}))


def test_an_infinite_time_step_limit_is_read_as_transformers_writes_it() -> None:
    config_from_json(fields_of(time_step_limit=[0.0, {"__float__": "Infinity"}]))


def test_a_new_model_of_transformers_starts_within_our_time_steps(tmp_path: Path) -> None:
    """As exported, every head starts in the middle of our range or above; by the card's lines, all over the range."""
    small_model("MM", mamba_heads=512, mamba_head_dim=2, expert_size=16).save_pretrained(tmp_path)
    namespace: dict[str, Any] = {"folder": tmp_path}
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    exec((tmp_path / "README.md").read_text().split("```python\n")[2].split("```")[0], namespace)
    for model, least, lower_half in ((made, 0.01, 0.0), (namespace["model"], 1e-3, 0.5)):
        dt = torch.cat([layer.mixer.dt_bias for layer in model.model.layers]).float().exp().log1p().detach()
        assert dt.min() > 0.99 * least
        assert dt.max() < 0.1001
        assert abs(float((dt < 0.0099).float().mean()) - lower_half) < 0.06
    assert made.model.layers[0].mixer.time_step_limit[0] <= 1e-30


@pytest.mark.parametrize("precision", [{}, {"scan": "bf16", "experts": "bf16"}, {"scan": "fp8", "experts": "bf16"}])
def test_a_folder_of_the_first_models_is_read(precision: dict[str, str], tmp_path: Path) -> None:
    """They had a table of precisions by role, which says nothing if it is bf16 throughout."""
    model = roughened(Yaongi(small_config(engram=[ENGRAM])))
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["model"]["precision"] = precision
    (tmp_path / "config.json").write_text(json.dumps(fields))
    if "fp8" in precision.values():
        with pytest.raises(ValueError, match=r"precision"):
            Yaongi.from_pretrained(tmp_path)
        return
    back, ids = Yaongi.from_pretrained(tmp_path), token_ids(model, 2, 9)
    assert back.config == model.config
    assert torch.equal(back(ids), model(ids))
