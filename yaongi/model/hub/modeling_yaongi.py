"""Code with which `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads a model with Engram.

Every folder of model_type "yaongi" contains a copy of this file. The classes come from the yaongi package, which must
be installed.
"""

from yaongi.model.hub.transformers_model import YaongiConfig, YaongiForCausalLM, YaongiModel

__all__ = ["YaongiConfig", "YaongiForCausalLM", "YaongiModel"]
