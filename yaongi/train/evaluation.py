"""The evaluations of a run: bits per byte on fixed held-out rows of each domain, and samples for three prompts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from yaongi.data.loader import HeldOut, Loader
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.bits_per_byte import bits_per_byte, nats
from yaongi.model import Yaongi
from yaongi.model.sampling import Sampling, choose, row_uniforms
from yaongi.world import World

PROMPTS = {
    "Korean": "오늘은 아침부터 ",
    "code": "def __init__(self, ",
    "math": "문제: ",
}


class Evaluator:
    """The held-out rows, which are the same at every evaluation and for any number of processes."""

    def __init__(self, loader: Loader, rows: int, world: World, warn: Callable[[str], None]) -> None:
        """Read the held-out rows.

        Args:
            rows: held-out rows per domain. A domain whose held-out text doesn't fill one row is left out, with a
                warning.
        """
        self._world = world
        self._held_out: dict[str, HeldOut] = {}
        for domain in loader.domains:
            try:
                self._held_out[domain] = loader.held_out(domain, rows)
            except ValueError as error:
                warn(f"no bits per byte of {domain}: {error}")

    def bits_per_byte(self, model: Yaongi, rows_at_once: int) -> dict[str, float]:
        """Return the bits per byte of each domain."""
        device = self._world.device
        with evaluating(model):
            sums = [
                nats(model, self._share(rows), device=device, rows_at_once=rows_at_once)
                for rows in self._held_out.values()
            ]
        totals = self._world.all_reduce(torch.tensor(sums, dtype=torch.float64, device=device)).tolist()
        held_out = zip(self._held_out.items(), totals, strict=True)
        return {domain: bits_per_byte(total, int(rows.text_bytes.sum())) for (domain, rows), total in held_out}

    def _share(self, rows: HeldOut) -> HeldOut:
        """Return this process's rows. Every process gets the same number; rows added as padding don't count."""
        size, rank = self._world.size, self._world.rank
        count = -(-len(rows.input_ids) // size)
        wanted = torch.arange(count) * size + rank
        real = wanted < len(rows.input_ids)
        wanted[~real] = 0
        parts = {name: getattr(rows, name)[wanted] for name in ("input_ids", "document_ids", "predicted", "text_bytes")}
        parts["predicted"] = parts["predicted"] & real[:, None]
        return replace(rows, **parts)


@contextmanager
def evaluating(model: Yaongi) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients, within the block."""
    former = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(former)


def draw_samples(model: Yaongi, tokenizer: Tokenizer, tokens: int, device: torch.device) -> dict[str, str]:
    """Return each of the three prompts with its continuation; the same weights always give the same text."""
    return {name: prompt + continue_text(model, tokenizer, prompt, tokens, device) for name, prompt in PROMPTS.items()}


def continue_text(model: Yaongi, tokenizer: Tokenizer, prompt: str, tokens: int, device: torch.device) -> str:
    """Return the continuation of `prompt`: up to `tokens` tokens, or until the document ends.

    Tokens are sampled from the likeliest few. Each token takes a full forward pass over the context: this needs only
    `model.forward`, so it also works on a sharded model.

    Raises:
        ValueError: the model's logits are not numbers.
    """
    ids = tokenizer.encode(prompt)
    start, uniforms = len(ids), torch.from_numpy(row_uniforms(0, ids, 0, tokens))
    with evaluating(model):
        for number in range(tokens):
            context = torch.tensor([ids[-model.config.max_sequence_length :]], device=device)
            chosen = int(choose(model(context)[:, -1].cpu(), _SAMPLING, uniforms[number : number + 1]))
            if chosen in model.config.answer_ends:
                break
            if chosen < 0:
                raise ValueError(f"evaluation: logits must be finite numbers, got others at token {number} of a sample")
            ids.append(chosen)
    return tokenizer.decode(ids[start:])


_SAMPLING = Sampling(temperature=0.7, top_k=40)
