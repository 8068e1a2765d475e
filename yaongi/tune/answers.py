"""What a tuning measures besides bits per byte: the loss on held-out answers, which ones end, three conversations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from yaongi.data.chats.encode import encode_prompt
from yaongi.data.chats.rows import CHAT
from yaongi.data.loader import evenly
from yaongi.data.pieces import END_OF_TURN
from yaongi.data.row_loader import HeldOut
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.answering import CPU_PROMPTS, GPU_PROMPTS
from yaongi.model import Yaongi
from yaongi.model.generation import generate
from yaongi.train.evaluation.findings import Evaluation, Finding, text_lines
from yaongi.train.evaluation.held_out import HeldOutBits, evaluating
from yaongi.tune.chat_loader import ChatLoader
from yaongi.tune.config import TuneConfig
from yaongi.world import World

QUESTIONS = {
    "Korean": "안녕하세요? 간단히 자기소개를 해 주세요.",
    "code": "파이썬으로 두 수를 더하는 함수를 써 주세요.",
    "math": "사과 세 개와 배 네 개가 있습니다. 과일은 모두 몇 개입니까?",
}
ENDING = 0.9  # share of answers that must end by themselves at the end of a tuning
Prompts = list[list[int]]


@dataclass(frozen=True)
class HeldOutAnswers:
    """Held-out answers, to predict and to compare with."""

    rows: HeldOut | None  # what is learnt of them, to predict; None: not measured
    prompts: Prompts  # to be answered
    lengths: list[int]  # of the held-out answers to these, with their end
    ends_learnt: bool  # whether the end of an answer is learnt at all


NO_ANSWERS = HeldOutAnswers(None, [], [], True)


def chat_answers(loader: ChatLoader, rows: int, prompts: int, end: int) -> HeldOutAnswers:
    """Read held-out conversations: so many rows, and so many prompts with the last answer of each.

    Args:
        end: the id that ends an answer.

    Raises:
        ValueError: there are none.
    """
    chats, found, lengths = loader.held_out_chats(), [], []
    for number in evenly(len(chats.conversations), prompts) if prompts else ():
        prompt = chats.prompt(number).tolist()
        found.append(prompt)
        lengths.append(int(chats.conversations.lengths[number]) - len(prompt) - 1)
    learnt = bool((loader.chats.read(0).targets == end).any())
    return HeldOutAnswers(loader.held_out_answers(rows), found, lengths, learnt)


class AnswerEvaluation(Evaluation):
    """The trainer's evaluation on conversations, with the model's own answers."""

    def __init__(
        self,
        config: TuneConfig,
        rows: dict[str, HeldOut],
        tokenizer: Tokenizer,
        world: World,
        rows_at_once: int,
        say: Callable[[str], None],
        answers: HeldOutAnswers,
    ) -> None:
        """Prepare the questions; arguments and errors as in `Evaluation`."""
        super().__init__(config, rows, tokenizer, world, rows_at_once, say)
        self._run = config.run
        self._held = answers
        self._room = config.model.max_sequence_length
        self._questions = {
            name: encode_prompt([{"role": "user", "content": text}], tokenizer) for name, text in QUESTIONS.items()
        }
        for name, question in list(self._questions.items()):
            if len(question) + self._run.sample_tokens > self._room:
                del self._questions[name]
                say(f"no answer to the question {name}: it would exceed the model's {self._room} tokens")

    def texts(self, model: Yaongi, step: int) -> Iterator[Finding]:
        """Measure the held-out answers and the model's own, and have it answer three questions."""
        if self._held.rows is not None or self._held.prompts:
            yield self._answered(model, step)
        if self._run.sample_tokens:
            answers = self._generate(model, list(self._questions.values()), self._run.sample_tokens)
            texts = {
                name: f"{QUESTIONS[name]} → {self.tokenizer.decode(answer)}"
                for name, (answer, _) in zip(self._questions, answers, strict=True)
            }
            yield Finding("samples", {"texts": texts}, text_lines(texts))

    def _answered(self, model: Yaongi, step: int) -> Finding:
        """Return the loss per target, and which share of the answers to held-out prompts end, of what length."""
        values: dict[str, float] = {}
        said, warning, prompts = [], "", self._held.prompts
        if self._held.rows is not None:
            (nats,) = HeldOutBits({CHAT: self._held.rows}, self.world).nats(model, self.rows_at_once)
            values["loss"] = nats / int(self._held.rows.predicted.sum())
            said.append(f"loss {values['loss']:.3f}")
        if prompts:
            size, rank = self.world.size, self.world.rank
            answers = self._generate(model, prompts[rank::size], self._run.answer_tokens)
            counts = torch.tensor([sum(ends for _, ends in answers), sum(len(answer) for answer, _ in answers)])
            ended, tokens = self.world.sum_on_host(counts).tolist()
            values |= {"stop_rate": ended / len(prompts), "length": tokens / len(prompts)}
            said.append(f"{ended} of {len(prompts)} generated ones ended, {values['length']:.0f} tokens on average")
            if step == self.config.train.steps and values["stop_rate"] < ENDING:
                warning = f"only {ended} of {len(prompts)} answers ended by themselves: {self._cause()}"
        line = f"held-out answers: {', '.join(said)}"
        return Finding("answers", values, [line], {f"answers/{name}": value for name, value in values.items()}, warning)

    def _cause(self) -> str:
        """Say why answers don't end, as far as it can be known."""
        longer = sum(length >= self._run.answer_tokens for length in self._held.lengths)
        if not self._held.ends_learnt:
            return f"no {END_OF_TURN} of the conversations is learnt (python -m yaongi.data chat --show 3)"
        if longer > (1 - ENDING) * len(self._held.lengths):
            return f"{longer} of the held-out answers are not shorter than --answer-tokens {self._run.answer_tokens}"
        return "the tuning was too short or its steps too small for that: more --epochs, or a larger --lr-scale"

    def _generate(self, model: Yaongi, prompts: Prompts, tokens: int) -> list[tuple[list[int], bool]]:
        """Return the likeliest answer to each prompt, of at most so many tokens, and whether it ended by itself."""
        at_once = GPU_PROMPTS if self.world.device.type == "cuda" else CPU_PROMPTS
        answers: list[tuple[list[int], bool]] = []
        with evaluating(model):
            for start in range(0, len(prompts), at_once):
                some = prompts[start : start + at_once]
                most = min(tokens, self._room - max(map(len, some)))
                answers += [(answer, len(answer) < most) for answer in generate(model, some, max_new_tokens=most)]
        return answers
