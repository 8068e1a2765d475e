"""Samples of a model's text for three prompts."""

import torch

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
    """Return each of the three prompts with its continuation; the same weights always give the same text."""
    return {name: prompt + continue_text(model, tokenizer, prompt, tokens, world) for name, prompt in PROMPTS.items()}


def continue_text(model: Yaongi, tokenizer: Tokenizer, prompt: str, tokens: int, world: World) -> str:
    """Return the continuation of `prompt`: up to `tokens` tokens, or until the document ends.

    Tokens are sampled from the likeliest few. Each token takes a full forward pass over the context: this needs only
    `model.forward`, so it also works on a divided model. There all processes have to go on with the same token, so it
    is the first one's.

    Raises:
        ValueError: the model's logits are not numbers.
    """
    ids = tokenizer.encode(prompt)
    start, uniforms = len(ids), torch.from_numpy(row_uniforms(0, ids, 0, tokens))
    with evaluating(model):
        for number in range(tokens):
            context = torch.tensor([ids[-model.config.max_sequence_length :]], device=world.device)
            mine = int(choose(model(context)[:, -1].cpu(), _SAMPLING, uniforms[number : number + 1]))
            chosen = world.of_main(mine)
            if chosen in model.config.answer_ends:
                break
            if chosen < 0:
                raise ValueError(f"evaluation: logits must be finite numbers, got others at token {number} of a sample")
            ids.append(chosen)
    return tokenizer.decode(ids[start:])
