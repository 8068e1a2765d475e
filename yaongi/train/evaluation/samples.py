"""Samples of a model's text for three prompts."""

import numpy as np
import torch
from torch import nn

from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi
from yaongi.model.sampling import Sampling, choose, row_uniforms
from yaongi.train.evaluation.held_out import evaluating
from yaongi.world import World

PROMPTS = {
    "Korean": "오늘은 아침부터 ",
    "code": "def __init__(self, ",
    "math": "문제: ",
}
_SAMPLING = Sampling(temperature=0.7, top_k=40)


def draw_samples(model: Yaongi, tokenizer: Tokenizer, tokens: int, world: World) -> dict[str, str]:
    """Return each of the three prompts with its continuation; the same weights always give the same text.

    A continuation has up to `tokens` tokens, or ends with the document. Tokens are sampled from the likeliest few. Each
    token takes a full forward pass over the three contexts: this needs only `model.forward`, so it also works on a
    divided model. There all processes have to go on with the same tokens, so they are the first one's.

    Raises:
        ValueError: the model's logits are not numbers.
    """
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS.values()]
    uniforms = torch.from_numpy(np.stack([row_uniforms(0, prompt, 0, tokens) for prompt in prompts]))
    texts = [list(prompt) for prompt in prompts]
    going = [True] * len(texts)
    with evaluating(model):
        for number in range(tokens):
            chosen = world.of_main(choose(_next_logits(model, texts, world), _SAMPLING, uniforms[:, number])).tolist()
            if min(chosen) < 0:
                raise ValueError(f"evaluation: logits must be finite numbers, got others at token {number} of a sample")
            for row, (text, token) in enumerate(zip(texts, chosen, strict=True)):
                going[row] = going[row] and token not in model.config.answer_ends
                if going[row]:
                    text.append(token)
            if not any(going):
                break
    continuations = (tokenizer.decode(text[len(prompt) :]) for text, prompt in zip(texts, prompts, strict=True))
    return {name: prompt + more for (name, prompt), more in zip(PROMPTS.items(), continuations, strict=True)}


def _next_logits(model: Yaongi, texts: list[list[int]], world: World) -> torch.Tensor:
    """Return the logits after each text, (texts, V), on the CPU. What pads shorter ones comes after their ends."""
    contexts = [torch.tensor(text[-model.config.max_sequence_length :]) for text in texts]
    ids = nn.utils.rnn.pad_sequence(contexts, batch_first=True).to(world.device)
    ends = torch.tensor([len(context) - 1 for context in contexts], device=world.device)
    return model(ids)[torch.arange(len(texts), device=world.device), ends].cpu()
