"""A model without Engram as a GGUF file, with which llama.cpp runs it (its architecture `nemotron_h_moe`).

llama.cpp's own converter can't read our tokenizer: it takes every `nemotron_h` for byte-level BPE of a tokenizer that
it knows by hash. Its type `llama` is SentencePiece's algorithm, so the vocabulary is written as that.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yaongi import cli
from yaongi.model.config import ModelConfig

Tensor = torch.Tensor
GIVEN_NAMES = {  # what the gguf package calls parts whose names here it doesn't know
    "mixer.dt_bias": "mixer.dt.bias",
    "mixer.gate.e_score_correction_bias": "mixer.gate.e_score_correction.bias",
    "mixer.experts.up_proj": "mlp.experts.up_proj.weight",
    "mixer.experts.down_proj": "mlp.experts.down_proj.weight",
}
WIDE = ("ffn_gate_inp.weight", "ssm_conv1d.weight", "norm.weight")  # ends of names of matrices that stay float32


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's pieces by id, as SentencePiece has them."""

    pieces: list[str]
    scores: list[float]
    kinds: list[str]  # normal, unknown, control, user_defined or byte
    chat_template: str
    end_of_turn: int


def write_gguf(state: Mapping[str, Tensor], config: ModelConfig, vocabulary: Vocabulary, file: Path, name: str) -> None:
    """Write the file, complete or not at all. Matrices keep the dtype of the weights.

    Args:
        state: the model's tensors.
        name: what programs show as the model's name.

    Raises:
        ValueError: the gguf package is not installed, the model has an Engram, or the vocabulary has another size than
            the model's.
    """
    if config.engram:
        raise ValueError("export: model must be without Engram for a GGUF file, got one with it: --drop-engram")
    if len(vocabulary.pieces) != config.vocab_size:
        raise ValueError(f"export: tokenizer must have {config.vocab_size} pieces, got {len(vocabulary.pieces)}")
    cli.require("gguf")
    import gguf

    temporary = file.with_name(f".{file.name}.tmp")
    try:
        writer = gguf.GGUFWriter(temporary, "nemotron_h_moe")
        writer.add_name(name)
        _add_sizes(writer, config)
        _add_vocabulary(writer, gguf.TokenType, config, vocabulary)
        writer.add_file_type(_file_type(gguf.LlamaFileType, state["lm_head.weight"].dtype))
        for stored, tensor in _tensors(gguf, state, config):
            kind = _kind(gguf.GGMLQuantizationType, tensor.dtype)
            data = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
            writer.add_tensor(stored, data.numpy(), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _add_sizes(writer: Any, config: ModelConfig) -> None:
    """Add the architecture. A layer is Mamba-2 where it has neither key heads nor a feed-forward width."""
    attention, experts = config.layers_of("*"), config.layers_of("E")
    layers = range(len(config.pattern))
    writer.add_block_count(len(config.pattern))
    writer.add_context_length(config.max_sequence_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length([config.expert_size if i in experts else 0 for i in layers])
    writer.add_head_count(config.attention_heads)
    writer.add_head_count_kv([config.attention_kv_heads if i in attention else 0 for i in layers])
    writer.add_key_length(config.attention_head_dim)
    writer.add_value_length(config.attention_head_dim)
    writer.add_rope_scaling_finetuned(False)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_ssm_conv_kernel(config.mamba_conv)
    writer.add_ssm_state_size(config.mamba_state)
    writer.add_ssm_group_count(config.mamba_groups)
    writer.add_ssm_inner_size(config.mamba_width)
    writer.add_ssm_time_step_rank(config.mamba_heads)
    writer.add_expert_count(config.experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_expert_feed_forward_length(config.expert_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_size)
    writer.add_expert_shared_count(1)
    writer.add_expert_group_count(1)
    writer.add_expert_group_used_count(1)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(config.routed_scale)


def _add_vocabulary(writer: Any, kinds: Any, config: ModelConfig, vocabulary: Vocabulary) -> None:
    """Add pieces, control tokens and the chat template; blanks are never added or removed."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.encode() for piece in vocabulary.pieces])
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types([kinds[kind.upper()] for kind in vocabulary.kinds])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_unk_token_id(vocabulary.kinds.index("unknown"))
    writer.add_eot_token_id(vocabulary.end_of_turn)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)
    writer.add_chat_template(vocabulary.chat_template)


def _tensors(gguf: Any, state: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor under llama.cpp's name and in its shape, on the CPU."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.NEMOTRON_H_MOE, len(config.pattern))
    for own, tensor in state.items():
        given = next((own.replace(a, b) for a, b in GIVEN_NAMES.items() if own.endswith(a)), own)
        given = given.replace("backbone.", "model.") if ".mlp." in given else given
        stored = names.get_name(given, (".weight", ".bias"))
        if stored is None:
            raise ValueError(f"export: tensors must be those that llama.cpp knows, got {own}")
        tensor = tensor.detach().cpu()
        if own.endswith("mixer.A_log"):
            tensor = -tensor.float().exp()
        if own.endswith(("mixer.A_log", "mixer.D")):
            tensor = tensor.unsqueeze(-1)
        elif own.endswith("conv1d.weight"):
            tensor = tensor.squeeze(1)
        elif own.endswith("mixer.norm.weight"):
            tensor = tensor.unflatten(0, (config.mamba_groups, -1))
        wide = tensor.dim() == 1 or stored.endswith(WIDE) or not stored.endswith(".weight")
        yield stored, (tensor.float() if wide or tensor.dtype == torch.float64 else tensor).contiguous()


def _kind(kinds: Any, dtype: torch.dtype) -> Any:
    return {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}[dtype]


def _file_type(types: Any, dtype: torch.dtype) -> Any:
    narrow = {torch.float16: types.MOSTLY_F16, torch.bfloat16: types.MOSTLY_BF16}
    return narrow.get(dtype, types.ALL_F32)
