"""Tuning as what a run is for: conversations as its data, answers as what it measures, and a folder that chats."""

import shlex
from dataclasses import replace
from pathlib import Path

from yaongi.data.chats.rows import CHAT
from yaongi.data.pieces import END_OF_TURN
from yaongi.data.row_loader import RowLoader
from yaongi.data.shards import MANIFEST
from yaongi.data.tokenizer import MODEL_FILE, Tokenizer
from yaongi.eval.held_out import rows_of_domains
from yaongi.model import Yaongi
from yaongi.train.checkpoint.model_folder import save_model
from yaongi.train.config import Config
from yaongi.train.evaluation.findings import Evaluation
from yaongi.train.job import Pretraining
from yaongi.train.metrics.display import Display
from yaongi.tune.answers import NO_ANSWERS, AnswerEvaluation, chat_answers
from yaongi.tune.chat_loader import ChatLoader
from yaongi.tune.config import TuneConfig
from yaongi.world import World


class Tuning(Pretraining):
    """Supervised tuning on conversations."""

    module = "yaongi.tune"
    domain = CHAT  # what an epoch is counted by

    def open_data(self, config: Config) -> tuple[RowLoader, Tokenizer]:
        """Open what is tuned on, and the tokenizer stored with it.

        Raises:
            FileNotFoundError: there is nothing; the message names the command that makes it.
            ValueError: as in `open_loader`.
        """
        assert isinstance(config, TuneConfig)
        data = config.run.data
        if not (data / MANIFEST).is_file() or not (data / "tokenizer" / MODEL_FILE).is_file():
            made = f"python -m yaongi.data chat --out {shlex.quote(str(data))} makes one"
            wanted = "a folder of conversations or preferences with their tokenizer"
            raise FileNotFoundError(f"tune: --data must be {wanted}, got {data}; {made}")
        tokenizer = Tokenizer.load(data / "tokenizer")
        return self.open_loader(config, tokenizer), tokenizer

    def open_loader(self, config: TuneConfig, tokenizer: Tokenizer) -> RowLoader:
        """Open the conversations and the text that is read again; errors as in `ChatLoader`."""
        train, run = config.train, config.run
        return ChatLoader(
            run.data,
            run.base_data,
            tokenizer,
            row_tokens=train.row_tokens,
            batch_rows=train.batch_rows,
            seed=train.seed,
            mix=train.mix,
        )

    def fit(self, config: Config, tokenizer: Tokenizer, loader: RowLoader) -> Config:
        """Return the configuration with the tokens of its epochs, and a model whose answers end with their turn."""
        assert isinstance(config, TuneConfig)
        epochs, shares = config.tune.epochs, loader.mixture.shares
        config = super().fit(config, tokenizer, loader)
        rows = epochs * loader.rows[self.domain] * sum(shares.values()) / shares[self.domain]
        steps = max(1, round(rows / config.train.batch_rows))
        ends = tuple(dict.fromkeys((*config.model.stop_token_ids, tokenizer.piece_to_id(END_OF_TURN))))
        return replace(
            config,
            model=replace(config.model, stop_token_ids=ends),
            train=replace(config.train, tokens=float(steps * config.train.batch_tokens)),
        )

    def evaluation(
        self,
        config: Config,
        loader: RowLoader,
        tokenizer: Tokenizer,
        world: World,
        rows_at_once: int,
        display: Display,
    ) -> Evaluation:
        """Return what the run measures between steps; of what there is no held-out text is left out."""
        assert isinstance(config, TuneConfig)
        assert isinstance(loader, ChatLoader)
        run, answers = config.run, NO_ANSWERS
        rows = rows_of_domains(loader, run.evaluate_rows, display.warn)
        if CHAT in rows:
            end = tokenizer.piece_to_id(END_OF_TURN)
            answers = chat_answers(loader, run.evaluate_rows, run.stop_prompts, end)
        return AnswerEvaluation(config, rows, tokenizer, world, rows_at_once, display.say, answers)

    def save_model(self, model: Yaongi, tokenizer: Tokenizer, folder: Path, world: World) -> None:
        """Write a model folder whose files say that answers end with their turn; errors as in `Pretraining`."""
        save_model(model, tokenizer, folder, world, chat=True)
