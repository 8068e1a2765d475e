"""`python -m yaongi.train --preset yaongi-tiny`: pretraining, on one device or under `torchrun`.

It resumes by itself when the output folder holds a run of the same configuration and data.
"""

import sys
from collections.abc import Sequence

import torch

from yaongi import cli
from yaongi.train.checkpoint.checkpoints import DamagedError
from yaongi.train.command_line import parse
from yaongi.train.config import Config
from yaongi.train.plan.advice import explain_out_of_memory
from yaongi.train.session import Session
from yaongi.train.signals import StopRequest, resume_command
from yaongi.train.step.guard import BadStepError
from yaongi.world import World, init_world, set_determinism


def train(config: Config, world: World, arguments: Sequence[str]) -> int:
    """Train to the end, or until a signal, and return the exit code."""
    session = Session(config, world)
    if not config.run.dry_run:
        session.claim()
    session.show_plan()
    if config.run.dry_run:
        return 0
    if not session.plan.fits:
        raise ValueError(f"train: the run does not fit into memory: {session.plan.advice}")
    try:
        return _train(session, world, arguments)
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            explain_out_of_memory(error, session.plan.share, session.plan.micro_rows, config.run.recompute)
        ) from error


def _train(session: Session, world: World, arguments: Sequence[str]) -> int:
    session.start()
    run = session.config.run
    with StopRequest() as stop, session:
        if session.lacks_evaluation():
            session.evaluate()
        for batches in session.batches():
            session.train_step(batches)
            stopping = world.any(stop.signal is not None)
            last = session.step == run.stop_after
            if stopping or last or session.due(run.checkpoint_every):
                session.save(wait=stopping)
            if not stopping and session.due(run.evaluate_every):
                session.evaluate()
            if (stopping or last) and session.step < session.schedule.steps:
                session.checkpoints.wait()
                session.display.say(f"saved step {session.step}; go on with: {resume_command(arguments)}")
                return stop.exit_code
        session.finish()
    return 0


def run(arguments: Sequence[str]) -> int:
    """Parse the command line, train, and return the exit code.

    Raises:
        ValueError, TypeError, OSError, MemoryError: the user made a mistake or the machine is too small.
    """
    config = parse(arguments)
    world = init_world(config.run.device)
    try:
        set_determinism(config.run.deterministic)
        return train(config, world, arguments)
    except DamagedError as error:
        advice = "there is no older one that is whole"
        if error.whole is not None:
            advice = f"go on from an older one with: {resume_command(arguments, error.whole)}"
        raise ValueError(f"{error}; {advice}") from error
    except BadStepError as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise ValueError(f"{operation} can't give the same bits every time here: add --no-deterministic") from error
    finally:
        world.close()


def main() -> None:
    """Run the command; an error is one line on standard error."""
    cli.run(lambda: run(sys.argv[1:]), interrupted="interrupted before the first step")


if __name__ == "__main__":
    main()
