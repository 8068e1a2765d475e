"""What a tuning measures besides bits per byte: the loss on held-out answers, which ones end, three conversations."""

from collections.abc import Callable, Iterator

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
        loader: ChatLoader,
    ) -> None:
        """Read the held-out prompts; arguments and errors as in `Evaluation`."""
        super().__init__(config, rows, tokenizer, world, rows_at_once, say)
        self._run = config.run
        self._end = tokenizer.piece_to_id(END_OF_TURN)
        self._answers: HeldOut | None = None
        self._prompts: Prompts = []
        self._lengths: list[int] = []  # of the held-out answers to them, with their end
        self._room = config.model.max_sequence_length
        self._questions = {
            name: encode_prompt([{"role": "user", "content": text}], tokenizer) for name, text in QUESTIONS.items()
        }
        for name, question in list(self._questions.items()):
            if len(question) + self._run.sample_tokens > self._room:
                del self._questions[name]
                say(f"no answer to the question {name}: it would exceed the model's {self._room} tokens")
        self._ends_learnt = bool((torch.from_numpy(loader.chats.read(0).targets) == self._end).any())
        if CHAT in rows:
            self._answers = loader.held_out_answers(config.run.evaluate_rows)
            chats = loader.held_out_chats()
            for number in evenly(len(chats.conversations), self._run.stop_prompts) if self._run.stop_prompts else ():
                prompt = chats.prompt(number).tolist()
                self._prompts.append(prompt)
                self._lengths.append(int(chats.conversations.lengths[number]) - len(prompt) - 1)

    def texts(self, model: Yaongi, step: int) -> Iterator[Finding]:
        """Measure the held-out answers and the model's own, and have it answer three questions."""
        if self._answers is not None:
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
        assert self._answers is not None
        (nats,) = HeldOutBits({CHAT: self._answers}, self.world).nats(model, self.rows_at_once)
        values: dict[str, float] = {"loss": nats / int(self._answers.predicted.sum())}
        line = f"held-out answers: loss {values['loss']:.3f}"
        warning = ""
        if self._prompts:
            size, rank = self.world.size, self.world.rank
            answers = self._generate(model, self._prompts[rank::size], self._run.answer_tokens)
            counts = torch.tensor([sum(ends for _, ends in answers), sum(len(answer) for answer, _ in answers)])
            ended, tokens = self.world.all_reduce(counts.to(self.world.device)).tolist()
            values |= {"stop_rate": ended / len(self._prompts), "length": tokens / len(self._prompts)}
            line += f", {ended} of {len(self._prompts)} generated ones ended, {values['length']:.0f} tokens on average"
            if step == self.config.train.steps and values["stop_rate"] < ENDING:
                warning = f"only {ended} of {len(self._prompts)} answers ended by themselves: {self._cause()}"
        return Finding("answers", values, [line], {f"answers/{name}": value for name, value in values.items()}, warning)

    def _cause(self) -> str:
        """Say why answers don't end, as far as it can be known."""
        longer = sum(length >= self._run.answer_tokens for length in self._lengths)
        if not self._ends_learnt:
            return f"no {END_OF_TURN} of the conversations is learnt (python -m yaongi.data chat --show 3)"
        if longer > (1 - ENDING) * len(self._lengths):
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
