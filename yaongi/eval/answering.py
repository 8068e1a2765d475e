"""Answers to prompts, in batches of like length; the same ones for any number of processes."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from yaongi.data.chats.encode import encode_rendered
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.progress import Done
from yaongi.model import Yaongi
from yaongi.model.generation import stream_text
from yaongi.model.sampling import Sampling
from yaongi.world import World

GREEDY = Sampling()
GPU_PROMPTS, CPU_PROMPTS = 64, 8  # answered at once


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    text: str
    stop: tuple[str, ...] = ()  # strings that end the answer, which doesn't hold them
    max_new_tokens: int = 256
    sampling: Sampling = GREEDY


@dataclass
class AnswerTally:
    """What answering has cost so far, over all processes."""

    prompts: int = 0
    cut: int = 0  # prompts that lost their beginning, to leave room for the answer
    cut_tokens: int = 0  # tokens that they lost
    tokens: int = 0  # tokens of the answers
    seconds: float = 0.0


@dataclass
class Answerer:
    """The answers of a model."""

    model: Yaongi
    tokenizer: Tokenizer
    world: World
    stop_pieces: tuple[str, ...] = ()  # pieces that end an answer besides the model's own, as in a chat
    at_once: int = 0  # prompts answered together; 0: 64 on a GPU, 8 on a CPU; halved where they don't fit into memory
    seed: int = 0
    done: Done = field(default_factory=Done)
    say: Callable[[str], None] = print
    tally: AnswerTally = field(default_factory=AnswerTally)

    def __post_init__(self) -> None:
        """Choose how many prompts are answered at once."""
        if not self.at_once:
            self.at_once = GPU_PROMPTS if self.world.device.type == "cuda" else CPU_PROMPTS

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the answer to each prompt, which ends before a stop string, or with a token that ends an answer.

        A prompt that leaves too little room for its answer loses its first tokens. An empty one is a BOS token.

        Raises:
            ValueError: an answer may be longer than the model's `max_sequence_length` allows.
        """
        began = time.perf_counter()
        ids = [self._encode(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: (_settings(prompts[i]), -len(ids[i]), i))
        batches: list[list[int]] = []
        for i in order:
            last = batches[-1] if batches else []
            if last and len(last) < self.at_once and _settings(prompts[last[0]]) == _settings(prompts[i]):
                last.append(i)
            else:
                batches.append([i])
        digests = [_digest([(ids[i], _settings(prompts[i])) for i in batch], self.seed) for batch in batches]
        found: dict[int, tuple[str, int]] = {}
        for batch, digest in zip(batches, digests, strict=True):
            if digest in self.done:
                found |= zip(batch, self.done[digest], strict=True)
        todo = [number for number, digest in enumerate(digests) if digest not in self.done]
        for number in todo[self.world.rank :: self.world.size]:
            batch = batches[number]
            answers = self._answer_batch([ids[i] for i in batch], prompts[batch[0]])
            self.done.add(digests[number], answers)
            found |= zip(batch, answers, strict=True)
        for part in self.world.gather(found):
            found |= part
        self.tally.prompts += len(prompts)
        self.tally.tokens += sum(tokens for _, tokens in found.values())
        self.tally.seconds += time.perf_counter() - began
        return [found[i][0] for i in range(len(prompts))]

    def _encode(self, prompt: Prompt) -> list[int]:
        limit = self.model.config.max_sequence_length
        if not 1 <= prompt.max_new_tokens < limit:
            wanted = f"max_new_tokens must be 1 to {limit - 1}, below the model's max_sequence_length"
            raise ValueError(f"eval: {wanted}, got {prompt.max_new_tokens}; --max-new-tokens sets a limit")
        ids = encode_rendered(prompt.text, self.tokenizer.encode) or [self.tokenizer.bos_id]
        room = limit - prompt.max_new_tokens
        if len(ids) > room:
            self.tally.cut += 1
            self.tally.cut_tokens += len(ids) - room
        return ids[-room:]

    def _answer_batch(self, ids: Sequence[Sequence[int]], prompt: Prompt) -> list[tuple[str, int]]:
        """Return the answers and their tokens, in parts if the batch doesn't fit into memory."""
        answers: list[tuple[str, int]] = []
        while len(answers) < len(ids):
            try:
                answers += self._answer_rows(ids[len(answers) :][: self.at_once], prompt)
            except torch.OutOfMemoryError:
                if self.at_once == 1:
                    raise
                self.at_once //= 2
                self.say(f"out of memory: {self.at_once} prompts at once from here on")
                if self.world.device.type == "cuda":
                    torch.cuda.empty_cache()
        return answers

    def _answer_rows(self, ids: Sequence[Sequence[int]], prompt: Prompt) -> list[tuple[str, int]]:
        texts = [""] * len(ids)
        ends = [self.tokenizer.piece_to_id(piece) for piece in self.stop_pieces]
        pieces = stream_text(
            self.model,
            ids,
            prompt.sampling,
            self.tokenizer.decode,
            stop=[*self.model.config.answer_ends, *ends],
            stop_strings=[stop for stop in prompt.stop if stop],
            max_new_tokens=prompt.max_new_tokens,
            seed=self.seed,
        )
        for row, text in pieces:
            texts[row] += text
        counts = [len(self.tokenizer.encode(text)) for text in texts]
        return list(zip(texts, counts, strict=True))


def _settings(prompt: Prompt) -> tuple[object, ...]:
    """Return what the prompts of a batch have in common, as something that sorts."""
    return prompt.max_new_tokens, prompt.stop, repr(prompt.sampling)


def _digest(batch: Sequence[tuple[Sequence[int], tuple[object, ...]]], seed: int) -> str:
    return hashlib.sha256(json.dumps([batch, seed]).encode()).hexdigest()
