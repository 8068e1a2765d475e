"""An error of several processes, said once: each leaves its message in the store, and one of them prints all."""

import socket
import time

import torch.distributed as dist

from yaongi.world import World

_LOST = ("Connection reset by peer", "Connection closed by peer", "Connection refused", "Broken pipe")  # says gloo
PATIENCE = 5.0  # seconds for the others' messages


def agree_on_error(world: World, message: str) -> list[str]:
    """Return the lines that this process must print about an error: none, if a process of a lower rank prints them.

    An error of all processes is one line. Otherwise a line for each different one names the process that it comes from.

    Args:
        message: this process's error, one line.
    """
    if world.store is None:
        return [message]
    try:
        found = _collect(world, world.store, f"{place_of(world)}\n{message}")
    except RuntimeError:
        return []  # the store was in the first process, which has ended, and has printed
    if min(found) != world.rank:
        return []
    places, messages = zip(*(text.split("\n", 1) for text in found.values()), strict=True)
    if len(found) == world.size and len(set(messages)) == 1:
        return [message]
    lines: dict[str, str] = {}
    for rank, place, text in zip(found, places, messages, strict=True):
        lines.setdefault(text, f"rank {rank} of {world.size} ({place}): {text}")
    return list(lines.values())


def _collect(world: World, store: dist.Store, text: str) -> dict[int, str]:
    """Leave this process's text in the store, and return those of all processes that leave one in time, by rank."""
    store.set(_key(world.rank), text)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not store.check([_key(rank) for rank in range(world.size)]):
        time.sleep(0.05)
    return {r: store.get(_key(r)).decode() for r in range(world.size) if store.check([_key(r)])}


def is_loss(error: Exception) -> bool:
    """Return whether an error says that another process is gone."""
    return isinstance(error, dist.DistBackendError) or any(sign in str(error) for sign in _LOST)


def others_failed(world: World) -> bool:
    """Return whether another process has left a message: what fails here may then be a consequence."""
    store = world.store
    return store is not None and any(store.check([_key(r)]) for r in range(world.size) if r != world.rank)


def _key(rank: int) -> str:
    return f"error/{rank}"


def place_of(world: World) -> str:
    """Return the machine of this process, and its GPU."""
    host = socket.gethostname()
    return f"{host}, GPU {world.device.index}" if world.device.type == "cuda" else host
