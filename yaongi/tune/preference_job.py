"""Tuning on preferences as what a run is for: pairs as its data, and which of two answers the model finds likelier."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from yaongi.data.chats.rows import PREFERENCES, PreferenceRows
from yaongi.data.loader import evenly
from yaongi.data.row_loader import RowLoader
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.scoring import Scorer
from yaongi.model import Yaongi
from yaongi.train.build import weight_dtype
from yaongi.train.config import Config
from yaongi.train.evaluation.findings import Evaluation, Finding
from yaongi.train.evaluation.held_out import evaluating
from yaongi.train.metrics.display import Display
from yaongi.train.step.objective import Objective
from yaongi.tune.answers import AnswerEvaluation, HeldOutAnswers
from yaongi.tune.chat_loader import base_rows
from yaongi.tune.config import TuneConfig
from yaongi.tune.dpo import PreferenceLoss, preference_losses
from yaongi.tune.job import Tuning
from yaongi.tune.preferences import PairLoader, Scores, learnt_parts, reference_scores, score_pairs
from yaongi.world import World


class PreferenceTuning(Tuning):
    """Direct preference optimisation."""

    domain = PREFERENCES

    def __init__(self) -> None:
        self._held_out: Scores | None = None  # the reference's, of the held-out pairs

    def open_loader(self, config: TuneConfig, tokenizer: Tokenizer) -> RowLoader:
        """Open the pairs; errors as in `PairLoader`."""
        train = config.train
        if train.mix not in ("", f"{PREFERENCES}=1"):
            raise ValueError(f"tune: --mix must be left out with --objective dpo, got {train.mix}")
        return PairLoader(
            config.run.data, tokenizer, row_tokens=train.row_tokens, batch_rows=train.batch_rows, seed=train.seed
        )

    def prepare(self, config: Config, loader: RowLoader, world: World, say: Callable[[str], None]) -> None:
        """Have the reference score all pairs, if it hasn't yet. Raises OSError if their folder can't be written to."""
        assert isinstance(loader, PairLoader)
        assert config.run.init is not None
        dtype = weight_dtype(config.train, world.device)
        loader.reference = reference_scores(config.run.init, loader.preferences, world, dtype, say)
        if has_held_out(loader):
            self._held_out = reference_scores(config.run.init, loader.held_out_pairs(), world, dtype, say)

    def objective(self, config: Config) -> Objective:
        """Return the loss of preferences."""
        assert isinstance(config, TuneConfig)
        return PreferenceLoss(config.tune.weight, length_normalised=config.tune.length_normalised)

    def evaluation(
        self,
        config: Config,
        loader: RowLoader,
        tokenizer: Tokenizer,
        world: World,
        rows_at_once: int,
        display: Display,
    ) -> Evaluation:
        """Return what the run measures between steps."""
        assert isinstance(config, TuneConfig)
        assert isinstance(loader, PairLoader)
        rows = base_rows(config, tokenizer, display.warn)
        given = config, rows, tokenizer, world, rows_at_once, display.say
        if not has_held_out(loader):
            display.warn(f"no held-out pairs in {config.run.data}: what is preferred isn't measured")
            return AnswerEvaluation(*given, HeldOutAnswers(None, [], [], True))
        assert self._held_out is not None
        pairs = loader.held_out_pairs()
        return PreferenceEvaluation(*given, prompts_of(pairs, config.run.stop_prompts), pairs, self._held_out)


class PreferenceEvaluation(AnswerEvaluation):
    """The evaluation of answers, with the held-out pairs."""

    def __init__(self, *given: Any) -> None:
        """Take the arguments of `AnswerEvaluation`, then the held-out pairs and the reference's scores of them."""
        *others, self._pairs, self._reference = given
        super().__init__(*others)

    def texts(self, model: Yaongi, step: int) -> Iterator[Finding]:
        """Compare the pairs, then go on as with conversations."""
        tune, row = self.config.tune, self.config.train.row_tokens  # type: ignore[attr-defined]
        scorer = Scorer(model, self.world, row, self.rows_at_once, say=self.say, longest=row)
        with evaluating(model):
            scores = score_pairs(scorer, self._pairs)
        values = compare(scores, self._reference, self._pairs, tune.weight, tune.length_normalised)
        line = (
            f"held-out pairs: accuracy {100 * values['accuracy']:.1f}%, margin {values['margin']:.3f}, "
            f"chosen likelier {100 * values['likelier']:.1f}%, nats {values['chosen']:.2f} and {values['rejected']:.2f}"
        )
        yield Finding("preferences", values, [line], {f"preferences/{name}": value for name, value in values.items()})
        yield from super().texts(model, step)


def compare(
    scores: Scores, reference: Scores, pairs: PreferenceRows, beta: float, length_normalised: bool
) -> dict[str, float]:
    """Return means over pairs: loss, accuracy and margin against the reference, how often the chosen is likelier."""
    lengths = np.array([[int(answer.mask[1:].sum()) for answer in pairs.pair(n)] for n in range(pairs.pairs)])
    policy, before, tokens = map(torch.from_numpy, (scores, reference, lengths))
    losses, margins = preference_losses(policy, before, tokens, beta, length_normalised)
    return {
        "loss": float(losses.mean()),
        "accuracy": float((margins > 0).double().mean()),
        "margin": float(margins.mean()),
        "likelier": float((scores[:, 0] > scores[:, 1]).mean()),
        "chosen": float(scores[:, 0].mean()),
        "rejected": float(scores[:, 1].mean()),
    }


def prompts_of(pairs: PreferenceRows, count: int) -> HeldOutAnswers:
    """Return the prompts of pairs, spread evenly, and the lengths of the chosen answers."""
    prompts, lengths = [], []
    for number in evenly(pairs.pairs, count) if count else ():
        first = learnt_parts(pairs.pair(number)[0])[0]
        prompts.append(list(first.context))
        lengths.append(len(first.continuation))
    return HeldOutAnswers(None, prompts, lengths, True)


def has_held_out(loader: PairLoader) -> bool:
    """Return whether there are held-out pairs."""
    return bool(loader.preferences.shard_set.shards("val", PREFERENCES))
