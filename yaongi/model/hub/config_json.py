"""`config.json` of a model folder: the hub's `nemotron_h`, and our own `yaongi`, which can also describe Engram."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yaongi.files import read_json
from yaongi.model.config import ModelConfig

CONFIG, GENERATION = "config.json", "generation_config.json"
NEMOTRON_H = "nemotron_h"
YAONGI = "yaongi"
REMOTE_CODE = "modeling_yaongi"  # the module for transformers that a `yaongi` folder contains
SIZES = {  # our field: the hub's
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "mamba_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_groups": "n_groups",
    "mamba_state": "ssm_state_size",
    "attention_heads": "num_attention_heads",
    "attention_kv_heads": "num_key_value_heads",
    "attention_head_dim": "head_dim",
    "experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
    "shared_expert_size": "moe_shared_expert_intermediate_size",
}
SETTINGS: dict[str, tuple[str, Any]] = {  # our field: the hub's field and its default there
    "mamba_conv": ("conv_kernel", 4),
    "routed_scale": ("routed_scaling_factor", 1.0),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "max_sequence_length": ("max_position_embeddings", 4096),
    "pad_token_id": ("pad_token_id", 0),
    "bos_token_id": ("bos_token_id", 1),
    "eos_token_id": ("eos_token_id", 2),
}
FIXED: dict[str, Any] = {  # settings of nemotron_h that this model fixes; the values are the defaults there
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_bias": False,
    "use_conv_bias": True,
}
UNSUPPORTED: dict[str, Any] = {  # like FIXED, but not written, because older readers don't know the keys
    "moe_latent_size": None,
    "per_layer_config": None,
    "quantization_config": None,
    "time_step_limit": [0.0, math.inf],
}
ALIASES = {  # names of older configs, which transformers takes before the present ones
    "layer_types": "layers_block_type",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_limit": "time_step_limit",
    "mamba_n_groups": "n_groups",
    "num_local_experts": "n_routed_experts",
}
LETTERS = {"mamba": "M", "linear_attention": "M", "moe": "E", "attention": "*", "full_attention": "*", "mlp": "-"}
# transformers takes time_step_min both for the least dt of a prefill, where this model has none, and for the least dt
# of initial weights. 1e-30 is in effect no clamp (0 is refused). Heads that would start below the floor start at the
# floor, nearly all of them: it is the middle of our own range, 1e-3 to 0.1, on a logarithmic scale.
TIME_STEP_MIN, TIME_STEP_FLOOR, TIME_STEP_MAX = 1e-30, 1e-2, 0.1


def nemotron_h_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the `nemotron_h` config of a model; it has no place for Engram and backends."""
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": NEMOTRON_H,
        "dtype": dtype,
        "hybrid_override_pattern": config.pattern,
        "num_hidden_layers": len(config.pattern),
        **{hub: getattr(config, ours) for ours, hub in SIZES.items()},
        **{hub: getattr(config, ours) for ours, (hub, _) in SETTINGS.items()},
        **control_tokens(config),
        **FIXED,
        "chunk_size": 128,
        "expand": 2,
        "initializer_range": math.sqrt(0.8 / config.hidden_size),
        "intermediate_size": config.expert_size,
        "mamba_ssm_cache_dtype": "float32",
        "rescale_prenorm_residual": True,
        "residual_in_fp32": False,
        "time_step_floor": TIME_STEP_FLOOR,
        "time_step_max": TIME_STEP_MAX,
        "time_step_min": TIME_STEP_MIN,
        "use_cache": True,
    }


def yaongi_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the `yaongi` config of a model: all of it is under the key `model`."""
    return {
        "architectures": ["YaongiForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{REMOTE_CODE}.YaongiConfig",
            "AutoModel": f"{REMOTE_CODE}.YaongiModel",
            "AutoModelForCausalLM": f"{REMOTE_CODE}.YaongiForCausalLM",
        },
        "model_type": YAONGI,
        "dtype": dtype,
        **yaongi_sizes(config),
        **control_tokens(config),
        "model": config.to_dict(),
    }


def yaongi_sizes(config: ModelConfig) -> dict[str, Any]:
    """Return the sizes that tools look for in any config, under the hub's names."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.pattern),
        "num_attention_heads": config.attention_heads,
        "num_key_value_heads": config.attention_kv_heads,
        "head_dim": config.attention_head_dim,
        "max_position_embeddings": config.max_sequence_length,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def control_tokens(config: ModelConfig) -> dict[str, Any]:
    """Return the control tokens as the hub's files have them: several ends of an answer are a list."""
    ends = config.answer_ends
    return {
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
    }


def read_config_json(folder: Path) -> tuple[ModelConfig, str]:
    """Read the config of a model folder, and the name of its weights' dtype.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it has something that this model does not support.
    """
    if not (folder / CONFIG).is_file():
        made = "python -m yaongi.train --out RUN writes a model to RUN/model"
        raise FileNotFoundError(f"from_pretrained: folder must hold {CONFIG}, got {folder}; {made}")
    generation = folder / GENERATION
    fields = read_json(folder / CONFIG)
    config = config_from_json(fields, read_json(generation) if generation.is_file() else None)
    return config, str(fields.get("dtype") or fields.get("torch_dtype") or "float32")


def config_from_json(fields: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Read the config of either kind of folder. A ValueError names what is missing or not supported.

    Args:
        fields: config.json.
        generation: generation_config.json, whose ends of an answer count before those of config.json.
    """
    config = _model_config(fields)
    ends = (generation or {}).get("eos_token_id") or fields.get("eos_token_id")
    if ends in (None, []):
        return config
    first, *others = ends if isinstance(ends, list) else [ends]
    return dataclasses.replace(config, eos_token_id=first, stop_token_ids=tuple(others))


def _model_config(fields: Mapping[str, Any]) -> ModelConfig:
    kind = fields.get("model_type")
    if kind == YAONGI:
        if not isinstance(fields.get("model"), Mapping):
            raise ValueError(f"config.json: 'model' must be a table for model_type {YAONGI!r}, got none")
        return ModelConfig.from_dict(_without_precision(fields["model"]))
    if kind != NEMOTRON_H:
        raise ValueError(f"config.json: model_type must be {NEMOTRON_H!r} or {YAONGI!r}, got {kind!r}")
    fields = dict(fields) | {now: fields[old] for old, now in ALIASES.items() if old in fields}
    for key, value in (FIXED | UNSUPPORTED).items():
        if _plain(fields.get(key, value)) != value:
            raise ValueError(f"config.json: {key} must be {value!r}, got {fields[key]!r}")
    epsilon = fields.get("layer_norm_epsilon", SETTINGS["norm_eps"][1])
    if fields.get("norm_eps", epsilon) != epsilon:
        raise ValueError(f"config.json: norm_eps must be layer_norm_epsilon, {epsilon}, got {fields['norm_eps']}")
    missing = next((hub for hub in SIZES.values() if hub not in fields), None)
    if missing:
        raise ValueError(f"config.json: {missing!r} must be given, got {', '.join(fields)}")
    sizes = {ours: fields[hub] for ours, hub in SIZES.items()}
    settings = {ours: _first(fields.get(hub), default) for ours, (hub, default) in SETTINGS.items()}
    return ModelConfig.from_dict({"pattern": _pattern(fields), **sizes, **settings})


def _without_precision(model: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out a table of precisions by role that is bf16 throughout, as the first models had it: it says nothing."""
    table = model.get("precision")
    says_nothing = isinstance(table, Mapping) and set(table.values()) <= {"bf16"}
    return {key: value for key, value in model.items() if key != "precision" or not says_nothing}


def _plain(value: Any) -> Any:
    """Return a value of JSON with transformers' `{"__float__": "Infinity"}` as the number that it stands for."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _first(value: Any, default: Any) -> Any:
    """Return the value, the first item of a list (the hub's configs may list several ends of text), or the default."""
    if isinstance(value, list) and value:
        value = value[0]
    return default if value is None else value


def _pattern(fields: Mapping[str, Any]) -> str:
    """Return the layers' letters, from the list that transformers saves or from the pattern of older configs."""
    kinds = fields.get("layers_block_type")
    if kinds is None:
        if not isinstance(fields.get("hybrid_override_pattern"), str):
            raise ValueError("config.json: hybrid_override_pattern or layers_block_type must be given, got neither")
        return str(fields["hybrid_override_pattern"])
    unknown = next((kind for kind in kinds if kind not in LETTERS), None)
    if unknown is not None:
        raise ValueError(f"config.json: layers_block_type must be of {', '.join(LETTERS)}, got {unknown!r}")
    return "".join(LETTERS[kind] for kind in kinds)
