"""What must be the same on all processes: the data, the folder of the run, the weights."""

import secrets
import socket
import time
from pathlib import Path

import torch
from torch import nn

from yaongi.train.distributed.sharding import is_sharded, local_part
from yaongi.world import World

PATIENCE = 30.0  # seconds until a file is seen on another node
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def require_same_data(world: World, manifest: str) -> None:
    """Raise ValueError on all processes if one has other token shards.

    Args:
        manifest: hash of the shards' manifest.
    """
    hashes = world.gather(manifest)
    for rank, other in enumerate(hashes):
        if other != hashes[0]:
            raise ValueError(
                f"train: all processes must have the same data, got rank {rank} with other data "
                f"(manifest {other[:4]}…, rank 0 {hashes[0][:4]}…)"
            )


def require_same_folder(world: World, folder: Path) -> None:
    """Raise ValueError on all processes if `folder` is not one folder for all of them."""
    if world.size == 1:
        return
    name = world.gather(f".seen-by-all-{secrets.token_hex(8)}")[0]
    if world.is_main:
        (folder / name).touch()
    end = time.monotonic() + PATIENCE
    while not (folder / name).exists() and time.monotonic() < end:
        time.sleep(0.1)
    seen = world.gather(((folder / name).exists(), socket.gethostname(), str(folder)))
    if world.is_main:
        (folder / name).unlink()
    for rank, (found, host, _) in enumerate(seen):
        if not found:
            raise ValueError(
                f"train: --out {seen[0][2]} is not the same folder on {host} (rank {rank}): put it on a file system "
                "that all nodes share"
            )


def require_same_weights(world: World, model: nn.Module, step: int, degree: int = 1) -> None:
    """Raise ValueError on all processes if the weights of two that hold the same ones differ in a bit.

    Args:
        degree: processes over which experts are spread: so far apart are two that hold the same experts.
    """
    if world.size == 1:
        return
    digests = world.gather(_digest(model))
    for rank, (whole, divided) in enumerate(digests):
        for other, same in ((0, whole == digests[0][0]), (rank % degree, divided == digests[rank % degree][1])):
            if not same:
                raise ValueError(
                    f"train: rank {rank}'s weights differ from rank {other}'s at step {step}: its GPU may be faulty; "
                    f"step {step} is not saved"
                )


@torch.no_grad()
def _digest(model: nn.Module) -> tuple[int, int]:
    """Return the sums of the bits, read as integers, of weights that are whole and of those that are divided."""
    sums: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for tensor in model.state_dict().values():
        here = local_part(tensor.detach())
        if here.numel():
            sums[is_sharded(tensor)].append(here.view(_BITS[here.element_size()]).sum())
    whole, divided = (int(torch.stack(found).sum()) if found else 0 for found in sums.values())
    return whole, divided
