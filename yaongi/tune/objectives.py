"""Which job a command line of tuning asks for."""

import argparse
from collections.abc import Sequence

from yaongi.tune.job import Tuning
from yaongi.tune.preference_job import PreferenceTuning


def job_of(arguments: Sequence[str]) -> Tuning:
    """Return the job of `--objective`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--objective")
    chosen, _ = parser.parse_known_args(arguments)
    return PreferenceTuning() if chosen.objective == "dpo" else Tuning()
