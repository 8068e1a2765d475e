"""The plan as it is printed before the first step: the run, where it starts, and how often each source is read."""

from collections.abc import Callable

from yaongi.data.epochs import check_epochs, count_epochs, epoch_warnings
from yaongi.data.row_loader import RowLoader
from yaongi.train.config import Config
from yaongi.train.plan.run_plan import Plan

Say = Callable[[str], None]


def show_plan(plan: Plan, config: Config, loader: RowLoader, asked: float, say: Say, warn: Say) -> None:
    """Print the plan.

    Args:
        asked: tokens that were asked for, perhaps more than `max_epochs` allows.
        say, warn: print a text, and a warning.

    Raises:
        ValueError: a source is read too often.
    """
    train, run = config.train, config.run
    say(plan.lines())
    if run.init is not None:
        step = f", step {run.init_step}" if run.init_step else ""
        say(f"{'init':<12} {run.init}{step}, unless {run.out} has a checkpoint")
    say(f"{'mix':<12} {train.mix}" + (f"; not in it: {', '.join(loader.unused)}" if loader.unused else ""))
    epochs = count_epochs(loader.tokens, loader.mixture.shares, plan.tokens)
    for number, stream in enumerate(epochs):
        say(f"{'' if number else 'data':<12} {stream}")
    if train.tokens < asked:
        limit = f"at most {run.max_epochs:g} epochs of what is there, not the {asked:,.0f} asked for"
        say(f"{'':<12} {train.tokens:,.0f} tokens: {limit}")
    for line in epoch_warnings(epochs):
        warn(line)
    check_epochs(epochs, run.allow_epochs)
