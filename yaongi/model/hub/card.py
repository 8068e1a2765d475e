"""The model card: README.md of a model folder."""

from yaongi.model.config import ModelConfig
from yaongi.model.count import ParameterCounts

CARD = "README.md"
HUB_EXAMPLE = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder)  # transformers 5.17 or newer"""
ANEW = """
A new model of this architecture, with time steps that start between 1e-3 and 0.1 as this one's did:

```python
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained(folder)
config.time_step_min, config.time_step_floor = 1e-3, 1e-4  # config.json has others: transformers also clamps by them
model = AutoModelForCausalLM.from_config(config)
```
"""
OWN_EXAMPLE = """from yaongi.model import Yaongi

model = Yaongi.from_pretrained(folder)

from transformers import AutoModelForCausalLM  # with the yaongi package installed

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"""


def model_card(config: ModelConfig, counts: ParameterCounts, dtype: str, *, hub: bool, lost: str | None = None) -> str:
    """Return the text of the card.

    Args:
        hub: whether the folder has the hub's `nemotron_h` layout.
        lost: what an export left out, if anything.
    """
    letters = {"Mamba-2": "M", "expert": "E", "attention": "*"}
    layers = ", ".join(f"{len(config.layers_of(letter))} {kind}" for kind, letter in letters.items())
    rows = [
        ("parameters", f"{counts.total:,}"),
        ("active for a token", f"{counts.active:,}"),
        ("of them Engram tables", f"{counts.engram_tables:,}"),
        ("layers", f"{len(config.pattern)}: {layers}"),
        ("experts", f"{config.experts}, of which a token takes {config.experts_per_token}, and a shared one"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("weights", dtype),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    library = "transformers" if hub else "yaongi"
    note = f"\nLeft out in this export: {lost}.\n" if lost else ""
    return f"""---
library_name: {library}
pipeline_tag: text-generation
---

# A model of Open-Yaongi

A hybrid of Mamba-2, mixture-of-experts and grouped-query attention layers{"" if hub else ", with Engram"}.

| | |
|---|---|
{table}
{note}
```python
{HUB_EXAMPLE if hub else OWN_EXAMPLE}
```
{ANEW if hub else ""}"""
