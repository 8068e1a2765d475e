"""Which job a tuning is."""

from yaongi.tune.config import TuneConfig
from yaongi.tune.job import Tuning
from yaongi.tune.preference_job import PreferenceTuning


def job_of(config: TuneConfig) -> Tuning:
    """Return the job of `--objective`."""
    return PreferenceTuning() if config.tune.objective == "dpo" else Tuning()
