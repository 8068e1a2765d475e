"""Code with which `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads a model with Engram.

Every folder of model_type "yaongi" contains a copy of this file. The model itself comes from the yaongi package, which
must be installed; these classes wrap it for transformers: logits, loss and generation.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from yaongi.model import ModelConfig, Yaongi
from yaongi.model.generation import generate


class YaongiConfig(PreTrainedConfig):
    """A transformers config that keeps a `yaongi.model.ModelConfig` as a dict in `model`."""

    model_type = "yaongi"

    def __init__(self, model: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.model = model
        super().__init__(**kwargs)


class YaongiForCausalLM(PreTrainedModel):
    """A `yaongi.model.Yaongi` with the interface of transformers."""

    config_class = YaongiConfig

    def __init__(self, config: YaongiConfig, model: Yaongi | None = None) -> None:
        super().__init__(config)
        self.model = model or Yaongi(ModelConfig.from_dict(config.model or {}))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, *args: Any, **kwargs: Any
    ) -> "YaongiForCausalLM":
        """Load a local folder or a repository of the hub (revision, cache_dir and token are passed on)."""
        hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token") if kwargs.get(key) is not None}
        path = Path(folder) if Path(folder).is_dir() else Path(snapshot_download(str(folder), **hub))
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        model = Yaongi.from_pretrained(path, dtype=None if dtype == "auto" else dtype)
        config = kwargs.get("config") or YaongiConfig.from_pretrained(path)
        return cls(config, model).eval()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        """Return logits (B, L, V) in float32, and the mean loss if `labels` are given; they must be the input_ids."""
        loss = None if labels is None else self.model.loss(labels)
        return CausalLMOutput(loss=loss, logits=self.model(input_ids).float())

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int = 128, **kwargs: Any) -> torch.Tensor:
        """Return prompts (B, L) and their continuations in one tensor (B, L + the longest continuation).

        Keyword arguments are those of `yaongi.model.generation.generate`.
        """
        answers = generate(self.model, input_ids.tolist(), max_new_tokens=max_new_tokens, **kwargs)
        longest, pad = max(map(len, answers)), self.model.config.pad_token_id
        rows = [answer + [pad] * (longest - len(answer)) for answer in answers]
        return torch.cat([input_ids, input_ids.new_tensor(rows).view(len(rows), longest)], dim=1)
