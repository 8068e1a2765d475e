"""An error of several processes, said once: each leaves its message in the store, and one of them prints all."""

import re
import socket
import time

import torch.distributed as dist

from yaongi import cli
from yaongi.train.formatting import duration
from yaongi.world import World

_LOST = ("Connection reset by peer", "Connection closed by peer", "Connection refused", "Broken pipe")  # says gloo
_LATE = re.compile(r"Timed out waiting (\d+)ms|timeout caused pair closure")  # also by another's limit
PATIENCE = 5.0  # seconds for the others' messages


def introduce(world: World) -> None:
    """Leave this process's place in the store, for what others say of it when it no longer can."""
    if world.store is not None:
        world.store.set(f"place/{world.rank}", place_of(world))


def agree_on_error(world: World, message: str) -> list[str]:
    """Return the lines that this process must print about an error: none, if a process of a lower rank prints them.

    An error of all processes is one line. Otherwise a line for each different one names the process that it comes from.

    Args:
        message: this process's error, one line.
    """
    if world.store is None:
        return [message]
    try:
        found = {rank: text for rank, text in _collect(world, world.store, message).items() if text}
        if min(found) != world.rank:
            return []
        if len(found) == world.size and len(set(found.values())) == 1:
            return [message]
        lines: dict[str, str] = {}
        for rank, text in found.items():
            lines.setdefault(text, f"{_name(world, world.store, rank)}: {text}")
        return list(lines.values())
    except RuntimeError:
        return []  # the store was in the first process, which has ended, and has printed


def name_absent(world: World, error: Exception) -> list[str]:
    """Return the lines that this process must print where another one has ended or doesn't come.

    None, if a process of a lower rank prints them, or one has left a message, which is the cause.

    Args:
        error: what this process met in consequence.
    """
    if world.store is None:
        return [cli.one_line(error)]
    try:
        found = _collect(world, world.store, "")
        if any(found.values()) or min(found) != world.rank:
            return []
        absent = [_name(world, world.store, rank) for rank in range(world.size) if rank not in found]
    except RuntimeError:
        return []  # as above
    late = _LATE.search(str(error))
    limit = f" within {duration(int(late[1]) / 1e3)}" if late and late[1] else ""
    what = f"did not come{limit}" if late else "has ended"
    return [f"{name} {what}" for name in absent] or [cli.one_line(error)]


def _collect(world: World, store: dist.Store, text: str) -> dict[int, str]:
    """Leave this process's text in the store, and return those of all processes that leave one in time, by rank."""
    store.set(_key(world.rank), text)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not store.check([_key(rank) for rank in range(world.size)]):
        time.sleep(0.05)
    return {r: store.get(_key(r)).decode() for r in range(world.size) if store.check([_key(r)])}


def _name(world: World, store: dist.Store, rank: int) -> str:
    place = f"place/{rank}"
    return f"rank {rank} of {world.size}" + (f" ({store.get(place).decode()})" if store.check([place]) else "")


def is_consequence(world: World, error: Exception) -> bool:
    """Return whether an error follows from another process's: that one is gone, did not come, or has said so."""
    text, store = str(error), world.store
    if isinstance(error, dist.DistBackendError) or any(sign in text for sign in _LOST) or _LATE.search(text):
        return True
    return store is not None and any(store.check([_key(r)]) for r in range(world.size) if r != world.rank)


def _key(rank: int) -> str:
    return f"error/{rank}"


def place_of(world: World) -> str:
    """Return the machine of this process, and its GPU."""
    host = socket.gethostname()
    return f"{host}, GPU {world.device.index}" if world.device.type == "cuda" else host
