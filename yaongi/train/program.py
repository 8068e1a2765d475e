"""A whole run, as a program: of `python -m yaongi.train` and of tuning, on one device or under `torchrun`.

It resumes by itself when the output folder holds a run of the same configuration and data.
"""

import os
import sys
import time
import traceback
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from yaongi import cli
from yaongi.train.checkpoint.checkpoints import DamagedError, step_of
from yaongi.train.config import Config
from yaongi.train.distributed.errors import agree_on_error, introduce, is_consequence, name_absent
from yaongi.train.distributed.watch import Watch, record_collectives
from yaongi.train.job import PRETRAINING, Pretraining
from yaongi.train.plan.advice import explain_out_of_memory
from yaongi.train.plan.run_plan import make_plan
from yaongi.train.session import Session
from yaongi.train.signals import StopRequest, resume_command
from yaongi.train.step.guard import BadStepError
from yaongi.world import World, init_world, set_determinism


def train(config: Config, world: World, arguments: Sequence[str], job: Pretraining = PRETRAINING) -> int:
    """Train to the end, or until a signal, and return the exit code."""
    session = Session(config, world, job)
    if not config.run.dry_run:
        session.claim()
    session.show_plan()
    if config.run.dry_run:
        return 0
    if not session.plan.fits:
        raise ValueError(f"train: the run does not fit into memory: {session.plan.advice}")
    try:
        return _train(session, world, arguments)
    except BadStepError as error:
        raise ValueError(f"{error}; {_way_past(session, arguments)}") from error
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            explain_out_of_memory(error, session.plan.share, session.plan.micro_rows, config.run.recompute)
        ) from error


def _train(session: Session, world: World, arguments: Sequence[str]) -> int:
    session.start()
    run = session.config.run
    watch = Watch(world, run.out, lambda: (session.step, session.stepper.doing))
    with StopRequest(world, run.out, lambda: _progress(session)) as stop, watch, session:
        if session.lacks_evaluation():
            with stop.unwatched(), watch.paused():
                session.evaluate()
        began, first = time.monotonic(), session.step + 1
        for batches in session.batches():
            session.train_step(batches)
            if session.step == first:
                world.expect_steps(time.monotonic() - began)
            stopping = stop.requested()
            last = session.step == run.stop_after
            saved = stopping or last or session.due(run.checkpoint_every)
            if saved:
                with watch.paused():
                    session.save(wait=stopping)
            if not stopping and session.due(run.evaluate_every):
                with stop.unwatched(), watch.paused():
                    session.evaluate()
                stopping = stop.requested()
                if stopping and not saved:
                    session.save(wait=True)
            if (stopping or last) and session.step < session.schedule.steps:
                session.checkpoints.wait()
                again = resume_command(arguments, module=session.job.module)
                session.display.say(f"saved step {session.step}; go on with: {again}")
                return stop.exit_code
        with watch.paused():
            session.finish()
    return 0


def _progress(session: Session) -> tuple[int, int]:
    """Return numbers of which one changes as long as a step or a save gets on."""
    return session.stepper.micro_batches, session.checkpoints.bytes_being_written()


def _way_past(session: Session, arguments: Sequence[str]) -> str:
    """Return the advice for a run that stopped on bad steps."""
    newest = session.checkpoints.latest()
    if newest is None:
        return "there is no checkpoint to go on from; a lower --clip or learning rate may help"
    step = step_of(newest)
    command = resume_command(arguments, module=session.job.module, skip_batches=session.step - step)
    return f"go on from step {step} without these batches: {command}"


def run(config: Config, arguments: Sequence[str], job: Pretraining = PRETRAINING) -> int:
    """Train, or print a plan, and return the exit code.

    Args:
        arguments: the command line of `config`, for commands that go on with the run.
        job: what the run is for.

    Raises:
        ValueError, TypeError, OSError, MemoryError: the user made a mistake or the machine is too small.
    """
    if config.run.plan_for != "none":
        print(make_plan(config, None, World(0, 1, torch.device("cpu"))).lines())
        return 0
    set_determinism(config.run.deterministic)
    record_collectives(config.run.out)
    world = init_world(config.run.device)
    introduce(world)
    try:
        status = _trained(config, world, arguments, job)
    except Exception as error:
        if world.size == 1:
            raise
        _say_once(world, error)
        os._exit(1)  # others may wait in a collective, and so would the end of the process group
    world.close()
    return status


def _say_once(world: World, error: Exception) -> None:
    """Print a user's mistake, or which process is missing, on one process; of a fault of the program the traceback.

    A fault goes to torchrun too, whose summary names the first one of its processes.
    """
    lines: list[str] = []
    if isinstance(error, cli.USER_ERRORS):
        lines = agree_on_error(world, cli.one_line(error))
    elif is_consequence(world, error):
        lines = name_absent(world, error)
    else:
        traceback.print_exception(error)
        get_error_handler().record_exception(error)
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()


def _trained(config: Config, world: World, arguments: Sequence[str], job: Pretraining) -> int:
    """Train, and turn what a user can mend into a ValueError."""
    try:
        return train(config, world, arguments, job)
    except DamagedError as error:
        advice = "there is no older one that is whole"
        if error.whole is not None:
            command = resume_command(arguments, module=job.module, from_step=error.whole)
            advice = f"go on from an older one with: {command}"
        raise ValueError(f"{error}; {advice}") from error
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise ValueError(f"{operation} can't give the same bits every time here: add --no-deterministic") from error
