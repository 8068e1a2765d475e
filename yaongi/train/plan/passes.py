"""What the passes of a model take on this machine: a CPU times them, for a GPU they are guessed."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from yaongi.data.row_loader import HeldOut
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.bits_per_byte import nats
from yaongi.model import Yaongi
from yaongi.model.layers.fp8_scales import MULTIPLE
from yaongi.train.build import build_model
from yaongi.train.config import Config
from yaongi.train.evaluation.held_out import evaluating
from yaongi.train.evaluation.samples import PROMPTS
from yaongi.train.plan.speed import step_speed

_LARGEST = 50_000_000  # parameters of a model that is timed
_SECONDS, _FEWEST = 1.5, 128  # that timing a micro-batch may take, as guessed; tokens that have to fit into them
_SAMPLE = 40  # tokens, of a sample that is being written


@dataclass(frozen=True)
class Passes:
    """The speed of a micro-batch, and seconds of the passes of an evaluation."""

    speed: float  # FLOP/s of a micro-batch, forwards and backwards
    held_out_row: float  # seconds of a row, forwards
    sample_token: float  # seconds of a pass over the samples; 0: not known
    basis: str  # what they follow from


def guessed_passes(speed: float, row_flops: float, basis: str) -> Passes:
    """Return what follows from the FLOP/s of a micro-batch: a forward pass has a third of the FLOPs."""
    return Passes(speed, row_flops / 3 / speed, 0.0, basis)


def passes_here(
    config: Config, tokenizer: Tokenizer | None, shapes: Yaongi, rows: int, flops: float, device: torch.device
) -> Passes:
    """Time the passes of a small model on a CPU, or guess them from the speed of a matrix product.

    Args:
        shapes: the model on the meta device.
        rows: per micro-batch.
        flops: per token.
    """
    dtype = shapes.lm_head.weight.dtype
    speed = step_speed(device, dtype)
    small = sum(p.numel() for p in shapes.parameters()) <= _LARGEST
    tokens, length = int(_SECONDS * speed / flops), config.train.row_tokens
    if device.type != "cpu" or not small or tokens < _FEWEST:
        return guessed_passes(speed, flops * length, "guessed from the speed of a matrix product")
    with torch.random.fork_rng(devices=[]):
        model = build_model(config, tokenizer, device, dtype=dtype)
        shape = min(rows, max(1, tokens // length)), min(length, tokens - tokens % MULTIPLE)
        return _timed(model, shape, length, flops)


def _timed(model: Yaongi, shape: tuple[int, int], length: int, flops: float) -> Passes:
    """Time the passes on random tokens, after smaller ones that make the buffers.

    Args:
        shape: rows and tokens of each that are timed.
        length: tokens of a row.
        flops: per token.
    """

    def train(rows: int, length: int) -> None:
        losses = model.losses(*_random(model, rows, length))
        (losses.cross_entropy_sum + losses.balance).backward()

    def evaluate() -> None:
        ids, documents = _random(model, *shape)
        counted = torch.ones_like(ids, dtype=torch.bool)
        nats(model, HeldOut(ids, documents, counted, counted.sum(1)), device=ids.device, rows_at_once=len(ids))

    def sample() -> None:
        model(_random(model, len(PROMPTS), _SAMPLE)[0])

    model.refresh_fp8()
    train(1, min(_FEWEST, shape[1]))
    tokens = math.prod(shape)
    speed = flops * tokens / _seconds(lambda: train(*shape))
    with evaluating(model):
        held_out = _seconds(evaluate) / tokens * length
        sample()
        return Passes(speed, held_out, _seconds(sample), "timed here")


def _random(model: Yaongi, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random ids of rows of one document each, and the ids of the documents."""
    ids = torch.randint(model.config.vocab_size, (rows, length))
    return ids, torch.zeros_like(ids, dtype=torch.int32)


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def evaluation_seconds(config: Config, passes: Passes, processes: int, domains: int) -> float:
    """Return what all evaluations of a run take: the held-out rows of each domain, and the samples.

    Args:
        processes: which share the rows, and draw the samples together.
        domains: number of those whose held-out text is measured.
    """
    train, run = config.train, config.run
    evaluations = 1 + -(-train.steps // run.evaluate_every)  # before the first step, and after the last
    rows = -(-run.evaluate_rows // processes) * domains
    return evaluations * (rows * passes.held_out_row + run.sample_tokens * passes.sample_token)
