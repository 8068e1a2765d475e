"""What a run is for: its data, what it measures, and the model folder that it leaves."""

from collections.abc import Callable
from pathlib import Path

from yaongi.data.row_loader import RowLoader
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.held_out import rows_of_domains
from yaongi.model import Yaongi
from yaongi.train.build import fit_to_data, open_data
from yaongi.train.checkpoint.model_folder import save_model
from yaongi.train.config import Config
from yaongi.train.evaluation.findings import Evaluation
from yaongi.train.metrics.display import Display
from yaongi.train.step.objective import NextToken, Objective
from yaongi.world import World


class Pretraining:
    """Pretraining on token shards. Tuning puts its own in its place."""

    module = "yaongi.train"  # of `python -m`

    def open_data(self, config: Config) -> tuple[RowLoader, Tokenizer]:
        """Open what the run reads, and its tokenizer; errors as in `build.open_data`."""
        return open_data(config)

    def fit(self, config: Config, tokenizer: Tokenizer, loader: RowLoader) -> Config:
        """Return the configuration with what follows from the data."""
        return fit_to_data(config, tokenizer, loader)

    def prepare(self, config: Config, loader: RowLoader, world: World, say: Callable[[str], None]) -> None:
        """Do what must be done before the model is built; nothing here."""

    def objective(self, config: Config) -> Objective:
        """Return what the run minimises."""
        return NextToken(config.train.z_loss)

    def evaluation(
        self,
        config: Config,
        loader: RowLoader,
        tokenizer: Tokenizer,
        world: World,
        rows_at_once: int,
        display: Display,
    ) -> Evaluation:
        """Return what the run measures between steps. A domain whose held-out text doesn't fill a row is left out."""
        rows = rows_of_domains(loader, config.run.evaluate_rows, display.warn)
        return Evaluation(config, rows, tokenizer, world, rows_at_once, display.say)

    def save_model(self, model: Yaongi, tokenizer: Tokenizer, folder: Path, world: World) -> None:
        """Write the model folder; errors as in `model_folder.save_model`."""
        save_model(model, tokenizer, folder, world)


PRETRAINING = Pretraining()
