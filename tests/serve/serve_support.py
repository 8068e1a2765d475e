"""What tests of the server share: a model that says what it is told to, and waiting."""

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence

import httpx
import torch
from models import SIZES

from yaongi.data.tokenizer import Tokenizer
from yaongi.model import ModelConfig, Yaongi

CAPACITY = 256
Serving = Callable[..., contextlib.AbstractContextManager[httpx.Client]]


def chain_model(tokenizer: Tokenizer, chain: Sequence[int], max_sequence_length: int = CAPACITY) -> Yaongi:
    """Return a model in which each token of a chain is followed by the next one, whatever came before."""
    sizes = SIZES | {"hidden_size": 128, "pattern": "E", "vocab_size": tokenizer.vocab_size}
    model = Yaongi(ModelConfig.from_dict(sizes | {"max_sequence_length": max_sequence_length}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("down_proj", "down_proj.weight")):
                parameter.zero_()
        embeddings = model.backbone.embeddings.weight
        torch.nn.init.normal_(embeddings)
        model.lm_head.weight.zero_()
        for token, following in itertools.pairwise(chain):
            model.lm_head.weight[following] += embeddings[token]
    return model


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.01)
