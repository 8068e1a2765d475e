"""A command in one process or in several that `torchrun` started: how it begins, and how a mistake ends it."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

from yaongi import cli
from yaongi.world import World, init_world

T = TypeVar("T")
FIRST = 5.0  # seconds that the others leave the first process to say what is wrong: then torchrun has ended them


def in_world(device: str, action: Callable[[World], T]) -> T:
    """Return what `action` returns in this world. Of several processes that fail alike, the first says why."""
    world = init_world(device, "eval")
    try:
        found = action(world)
    except Exception as error:
        if world.size == 1:
            raise
        if not world.is_main:
            time.sleep(FIRST)
        if isinstance(error, cli.USER_ERRORS):
            print(f"error: {cli.one_line(error)}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
        os._exit(1)  # the others may wait for this one, and so would the end of the process group
    world.close()
    return found
