"""The evaluations of a run, as findings to record, print and log."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from yaongi.data.row_loader import HeldOut
from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi
from yaongi.train.config import Config
from yaongi.train.evaluation.held_out import HeldOutBits
from yaongi.train.evaluation.samples import draw_samples
from yaongi.train.evaluation.task_scores import TaskScores, said
from yaongi.train.schedule import is_due
from yaongi.world import World


@dataclass(frozen=True)
class Finding:
    """What an evaluation found: a record for `metrics.jsonl`, lines to print, numbers for the sinks."""

    event: str
    values: dict[str, Any]
    lines: list[str] = field(default_factory=list)  # begun with the step, but for those that begin with a blank
    logged: dict[str, float] = field(default_factory=dict)
    warning: str = ""

    @property
    def texts(self) -> dict[str, str]:
        """Texts drawn from the model, by their prompts' names; most findings have none."""
        return self.values.get("texts", {})


class Evaluation:
    """Bits per byte of held-out text, scores on tasks if asked for, and samples."""

    def __init__(
        self,
        config: Config,
        rows: dict[str, HeldOut],
        tokenizer: Tokenizer,
        world: World,
        rows_at_once: int,
        say: Callable[[str], None],
    ) -> None:
        """Prepare the measures.

        Args:
            rows: the held-out rows of each domain.
            rows_at_once: of a pass of the model.

        Raises:
            ValueError: a data set of the tasks is not there.
        """
        run = config.run
        self.held_out = HeldOutBits(rows, world)
        self.config, self.tokenizer, self.world = config, tokenizer, world
        self.rows_at_once = rows_at_once
        self.say = say
        self._tasks = None
        if run.evaluate_tasks != "none":
            self._tasks = TaskScores(run.evaluate_tasks, tokenizer, world, config.train.row_tokens)

    def __call__(self, model: Yaongi, step: int) -> Iterator[Finding]:
        """Measure, and yield the findings one by one; every process has to call it."""
        bits = self.held_out.bits_per_byte(model, self.rows_at_once)
        logged = {f"bpb/{domain}": value for domain, value in bits.items()}
        yield Finding("evaluation", {"bpb": bits}, [_bits_line("", bits)], logged)
        scales = model.fp8_scales
        if scales is not None and step == self.config.train.steps:
            with scales.disabled():  # as the saved model will be run
                without = self.held_out.bits_per_byte(model, self.rows_at_once)
            yield Finding("evaluation_without_fp8", {"bpb": without}, [_bits_line(" without fp8", without)])
        yield from self._task_scores(model, step)
        yield from self.texts(model, step)

    def texts(self, model: Yaongi, step: int) -> Iterator[Finding]:
        """Draw samples."""
        if self.config.run.sample_tokens:
            drawn = draw_samples(model, self.tokenizer, self.config.run.sample_tokens, self.world)
            yield Finding("samples", {"texts": drawn}, text_lines(drawn))

    def _task_scores(self, model: Yaongi, step: int) -> Iterator[Finding]:
        """Score the tasks, if there are any and it is their turn."""
        run = self.config.run
        turn = is_due(run.evaluate_every * run.evaluate_tasks_every, step, self.config.train.steps)
        if self._tasks is None or not (turn or step == 0):
            return
        scores = self._tasks.measure(model, self.rows_at_once, self.say)
        logged: dict[str, float] = {}
        for name, found in scores.items():
            values = {"": found["metrics"]["acc"]["value"], "_margin": found["margin"]}
            logged |= {f"tasks/{name}{kind}": value for kind, value in values.items()}
        yield Finding("tasks", {"scores": scores}, [said(self._tasks.top(scores))], logged)


def text_lines(texts: dict[str, str]) -> list[str]:
    """Return a line for each text."""
    return [f"  {name}: {' '.join(text.split())}" for name, text in texts.items()]


def _bits_line(how: str, bits: dict[str, float]) -> str:
    return f"held-out bits per byte{how} {' '.join(f'{domain} {value:.3f}' for domain, value in bits.items())}"
