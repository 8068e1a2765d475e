"""This process's place among all, and what it asks of torch."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class World:
    """This process's place among all."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        if self.size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor(int(flag), device=self.device)).item())

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """End the communication."""
        if self.size > 1:
            dist.destroy_process_group()


def init_world(device: str) -> World:
    """Join the processes that `torchrun` started, if it did, and choose the device.

    Raises:
        ValueError: `cuda` was asked for and there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train: --device cuda must have a GPU, got a machine where torch sees none")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, torch.device(kind))
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    here = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    return World(dist.get_rank(), size, here, init_device_mesh(kind, (size,)))


def set_determinism(deterministic: bool) -> None:
    """Ask torch for the same bits every time; what can't give them on this device raises RuntimeError when it runs.

    With a warning instead, flash attention's backward pass takes its other form, silently but for one line.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
