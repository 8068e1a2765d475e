"""The model as transformers knows models: a config, the model without and with its head, and a cache.

It takes attention masks with padding on either side, labels with −100, a cache, and what `generate` and `pipeline`
pass; folders are read and written by `Yaongi` itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from yaongi.model.config import ModelConfig
from yaongi.model.decoding import Cache, read, step_hidden
from yaongi.model.engram.engram import Engram
from yaongi.model.hub.config_json import yaongi_sizes
from yaongi.model.hub.padding import align, rows_of
from yaongi.model.hub.weights import read_tensor
from yaongi.model.model import Yaongi

Tensor = torch.Tensor
ROOM = 256  # tokens that a cache has room for beyond those that were read; more is added when it is full
COMPRESSION = "backbone.compression"
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
IGNORED = (  # options of from_pretrained that change nothing here
    *HUB_OPTIONS,
    *("config", "dtype", "torch_dtype", "device_map", "trust_remote_code", "output_loading_info", "adapter_kwargs"),
    *("low_cpu_mem_usage", "use_safetensors", "attn_implementation", "code_revision", "_from_auto", "_commit_hash"),
    *("name_or_path", "resume_download", "proxies", "weights_only", "allow_all_kernels"),
)


class YaongiConfig(PreTrainedConfig):
    """A transformers config that keeps a `yaongi.model.ModelConfig` as a dict in `model`."""

    model_type = "yaongi"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (as the base class has it)

    def __init__(self, model: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.model = model
        sizes = {} if model is None else yaongi_sizes(ModelConfig.from_dict(model))
        super().__init__(**sizes | kwargs)


class YaongiCache:
    """The state between calls, as `past_key_values`: made by the model, continued in place."""

    is_compileable = False

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens that were read, padding included."""
        return self.cache.position

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order."""
        self.cache.select(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row so many times."""
        rows = torch.arange(len(self.cache.visible), device=self.cache.visible.device)
        self.cache.select(rows.repeat_interleave(repeats))


class YaongiPreTrainedModel(PreTrainedModel):
    """What the model has in transformers with and without its head: `yaongi`, a `yaongi.model.Yaongi`."""

    config_class = YaongiConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]  # noqa: RUF012 (as the base class has it)
    _supports_sdpa = True
    _is_stateful = True
    yaongi: Yaongi

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights as they are: `Yaongi` has drawn or read them."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a local folder or a repository of the hub.

        Of transformers' options it takes config, dtype, device_map (one device, or "auto" for a GPU where there is
        one), output_loading_info, and those of the hub.

        Raises:
            ValueError: an option is given that this model doesn't know.
        """
        unknown = [key for key, value in kwargs.items() if key not in IGNORED and value is not None]
        if unknown:
            raise ValueError(f"yaongi: options must be among {', '.join(IGNORED)}, got {unknown[0]}")
        path = _local(folder, kwargs)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        device = _device(kwargs.get("device_map"))
        model = Yaongi.from_pretrained(path, dtype=None if dtype == "auto" else dtype, device=device)
        config = kwargs.get("config") or cls.config_class.from_pretrained(path)
        config.dtype = model.lm_head.weight.dtype
        loaded = cls(config, model).eval()
        if loaded.can_generate() and (path / "generation_config.json").is_file():
            loaded.generation_config = GenerationConfig.from_pretrained(path)
        if kwargs.get("output_loading_info"):
            return loaded, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return loaded

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the folder that `Yaongi.save_pretrained` writes, with this model's generation config.

        Of transformers' other options none changes anything.

        Raises:
            ValueError: the folder is to be pushed to the hub, or the weights are to be a variant.
        """
        for name in ("push_to_hub", "variant"):
            if kwargs.get(name):
                raise ValueError(f"yaongi: {name} must be left out of save_pretrained, got {kwargs[name]!r}")
        if not is_main_process:
            return
        model = self.yaongi
        if state_dict is not None:
            model = Yaongi(model.config, device="meta")
            own = {name.rpartition("yaongi.")[2]: tensor for name, tensor in state_dict.items()}
            model.load_state_dict(own, assign=True)
        model.save_pretrained(save_directory)
        if self.can_generate():
            self.generation_config.save_pretrained(save_directory)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings."""
        return self.yaongi.backbone.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embeddings."""
        self.yaongi.backbone.embeddings = value  # type: ignore[assignment]

    def resize_token_embeddings(  # type: ignore[override]
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """Return the embeddings. Raises ValueError for another size: Engram's hashes depend on the vocabulary."""
        size = self.yaongi.config.vocab_size
        if new_num_tokens not in (None, size):
            raise ValueError(f"yaongi: vocabulary must keep its {size} entries, got {new_num_tokens}")
        return self.get_input_embeddings()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute the activations of all layers in the backward pass."""
        self.yaongi.recompute = "all"

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self.yaongi.recompute = "none"

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return self.yaongi.recompute != "none"


class YaongiModel(YaongiPreTrainedModel):
    """The model without its head: ids to hidden states."""

    def __init__(self, config: YaongiConfig, yaongi: Yaongi | None = None) -> None:
        super().__init__(config)
        self.yaongi = yaongi or _made(config)
        for module in self.yaongi.modules():
            if isinstance(module, Engram):
                module.sparse = False  # optimizers of other trainers take dense gradients
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: YaongiCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the normalised hidden states (B, L, d); arguments as in `YaongiForCausalLM.forward`."""
        ids = _checked(input_ids, past_key_values, kwargs)
        if past_key_values is not None:
            needed = past_key_values.cache.position + ids.shape[1]
            if needed > past_key_values.cache.capacity:
                past_key_values.cache.grow(needed + ROOM)
            steps = [step_hidden(self.yaongi, token, past_key_values.cache) for token in ids.unbind(1)]
            return _output(torch.stack(steps, dim=1), past_key_values)
        alignment = None if attention_mask is None else align(attention_mask)
        document_ids = _packed(position_ids, ids) if attention_mask is None else None
        if alignment is not None:
            ids, document_ids = rows_of(ids, alignment.order), alignment.document_ids
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True) and not torch.is_grad_enabled()
        cache = None
        if use_cache:
            hidden, state = read(self.yaongi, ids, document_ids, capacity=ids.shape[1] + ROOM)
            cache = YaongiCache(state)
        else:
            hidden = self.yaongi.hidden_states(ids, document_ids)
        return _output(hidden if alignment is None else rows_of(hidden, alignment.back), cache)


class YaongiForCausalLM(YaongiPreTrainedModel, GenerationMixin):
    """The model with its head: logits, loss, and transformers' own `generate`."""

    def __init__(self, config: YaongiConfig, yaongi: Yaongi | None = None) -> None:
        super().__init__(config)
        self.model = YaongiModel(config, yaongi)
        self.post_init()

    @property
    def yaongi(self) -> Yaongi:  # type: ignore[override]
        """The model itself."""
        return self.model.yaongi

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.yaongi.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.yaongi.lm_head = new_embeddings  # type: ignore[assignment]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first call of a generation makes the cache

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: YaongiCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits in float32, and the mean loss if there are labels.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L), 0 for padding, which may be anywhere. Its logits are those of the text before it.
                With a cache the mask may be longer; what was read stays as it was.
            position_ids: (B, L); without a mask, a document begins where they are 0. Otherwise they mean nothing: there
                are no position embeddings.
            past_key_values: what an earlier call returned.
            labels: (B, L), the input ids, −100 where there is no target; shifted here.
            use_cache: by default as in the config, but not with labels or where gradients are wanted.
            logits_to_keep: only the last so many positions; 0 for all.

        Raises:
            ValueError: an argument is not one of this model.
        """
        use_cache = False if use_cache is None and labels is not None else use_cache
        output = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache, **kwargs)
        kept = slice_logits_to_keep(output.last_hidden_state, logits_to_keep)
        logits = self.yaongi.lm_head(kept).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.yaongi.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values)


def _output(hidden: Tensor, cache: Any) -> BaseModelOutputWithPast:
    return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)


def _made(config: YaongiConfig) -> Yaongi:
    """Make the model of a config, with new weights of torch's default dtype."""
    settings = ModelConfig.from_dict(config.model or {})
    table = None
    if settings.engram and settings.compressed_vocab_size is not None:
        place = config.name_or_path
        if not place:
            raise ValueError("yaongi: config must come from a model folder, with Engram's compression, got none")
        table = read_tensor(_local(place, {}), COMPRESSION)
    return Yaongi(settings, dtype=torch.get_default_dtype(), compression=None if table is None else table.numpy())


def _local(folder: str | Path, options: Mapping[str, Any]) -> Path:
    """Return the local folder of a path or a repository of the hub."""
    if Path(folder).is_dir():
        return Path(folder)
    hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    return Path(snapshot_download(str(folder), **hub))


def _device(device_map: Any) -> torch.device:
    """Return the one device of a device_map."""
    if isinstance(device_map, dict):
        device_map = device_map.get("") if set(device_map) == {""} else "several devices"
    if device_map in (None, "auto"):
        return torch.device("cuda" if device_map and torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(f"yaongi: device_map must be one device or 'auto', got {device_map!r}") from None


def _checked(input_ids: Tensor | None, past: Any, options: Mapping[str, Any]) -> Tensor:
    """Return the ids; refuse what this model can't do by name."""
    if input_ids is None:
        raise ValueError("yaongi: input_ids must be given, since Engram looks them up, got none")
    for name in ("inputs_embeds", "output_hidden_states", "output_attentions"):
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"yaongi: {name} must be left out, got {type(options[name]).__name__}")
    if past is not None and not isinstance(past, YaongiCache):
        raise ValueError(f"yaongi: past_key_values must be what this model returned, got {type(past).__name__}")
    return input_ids


def _packed(position_ids: Tensor | None, ids: Tensor) -> Tensor | None:
    """Return document ids (B, L) for positions that begin anew at 0, as in rows packed without padding."""
    if position_ids is None or position_ids.shape != ids.shape:
        return None
    begins = position_ids == 0
    begins[:, 0] = True
    return begins.cumsum(1).int() if bool(begins[:, 1:].any()) else None
