"""This process's rank, device and collectives, and torch's determinism settings."""

import datetime
import gc
import os
import time
import uuid
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
# Their names from torch 2.13 on, where the former ones warn.
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
# How long processes wait for the others, until a collective fails:
FIRST_STEP = datetime.timedelta(minutes=30)  # at the start and in the first step, for some compile longer than others,
LATER_STEPS = datetime.timedelta(minutes=10)  # in later ones, which may take long themselves: or the time
STEPS = 4  # of so many,
HOST = datetime.timedelta(minutes=60)  # and for what some do alone: an evaluation, a checkpoint, a model's folder
NO_LIMIT = datetime.timedelta(days=365)


@dataclass(frozen=True)
class World:
    """This process's rank among the data-parallel processes, its device, and their collectives."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    store: dist.Store | None = None  # which the processes reach also while some of them wait in a collective
    local_size: int = 1  # processes on this host
    host: dist.ProcessGroup | None = None  # collectives on the CPU, in which processes may wait long for each other

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the maximum of `tensor` over the processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every process, in the order of their ranks; it must be picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def sum_on_host(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum `numbers`, which are on the CPU, over the processes, in place, and return them; no GPU is waited for."""
        if self.size > 1:
            dist.all_reduce(numbers, group=self.host)
        return numbers

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any process; nothing waits for the GPU."""
        return bool(self.sum_on_host(torch.tensor(int(flag))).item())

    def all(self, flag: bool) -> bool:
        """Return whether `flag` is set on every process; nothing waits for the GPU."""
        return not self.any(not flag)

    def of_main(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the whole numbers that the first process has, on the CPU; nothing waits for the GPU."""
        return self.sum_on_host(numbers if self.is_main else torch.zeros_like(numbers))

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    def wait_without_limit(self) -> None:
        """Wait until all processes are here, from now on however long that takes."""
        if self.host is not None:
            self.host.set_timeout(NO_LIMIT)
        self.barrier()

    def expect_steps(self, seconds: float) -> None:
        """Let collectives of later steps fail earlier than those of the first one, which takes the longest.

        Args:
            seconds: that the first one took.
        """
        if self.mesh is not None:
            longer = max(LATER_STEPS, STEPS * datetime.timedelta(seconds=seconds))
            self.mesh.get_group().set_timeout(min(FIRST_STEP, longer))

    def close(self) -> None:
        """Destroy the process group, when all processes are here."""
        if self.size > 1:
            gc.collect()  # CUDA graphs must go before the communicators
            self.barrier()
            dist.destroy_process_group()


def init_world(device: str, command: str = "train") -> World:
    """Join the processes that `torchrun` started, if any, and choose the device.

    Collectives of a step go by NCCL, on a CPU by gloo; all others by gloo, in a group of their own.

    Raises:
        ValueError: `device` is "cuda" or "gpu", and there is no GPU.
    """
    kind = {"auto": "cuda" if torch.cuda.is_available() else "cpu", "gpu": "cuda"}.get(device, device)
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{command}: --device {device} must have a GPU, got a machine where torch sees none")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, torch.device(kind))
    if kind == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ValueError(f"{command}: --nproc-per-node must be at most the {there} GPUs of this machine")
        torch.cuda.set_device(local)
    found, rank, size = next(rendezvous("env://"))
    found.set_timeout(FIRST_STEP)
    store = _unused_part(found, rank, size)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"  # gloo: for CPU tensors that torch itself may send
    own = dist.PrefixStore("collectives", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=FIRST_STEP)
    host = dist.new_group(backend="gloo", timeout=HOST)
    here = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    return World(rank, size, here, init_device_mesh(kind, (size,)), store, local, host)


def _unused_part(store: dist.Store, rank: int, size: int) -> dist.Store:
    """Return a part of the store, the same for all processes, that is empty.

    When torchrun starts all processes anew, it may give them the store of the dead ones, whose addresses they would
    take for those of the living. So the first process chooses a name, and answers each other one that found it.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + FIRST_STEP.total_seconds()
    if rank == 0:
        store.set("name", mine)
        for other in range(1, size):
            store.set(f"{mine}/answer/{other}", store.get(f"{mine}/question/{other}").decode())
        return dist.PrefixStore(mine, store)
    while time.monotonic() < end:
        name = store.get("name").decode()
        question, answer = f"{name}/question/{rank}", f"{name}/answer/{rank}"
        store.set(question, mine)
        if store.check([answer]) and store.get(answer).decode() == mine:
            return dist.PrefixStore(name, store)
        time.sleep(0.02)
    raise TimeoutError(f"train: {size} processes must start within {FIRST_STEP}, got no answer of the first")


def set_determinism(deterministic: bool) -> None:
    """Make torch's results bit-identical; an operation that can't do that on this device raises RuntimeError.

    An error, not a warning: with `warn_only`, flash attention's backward pass would take its non-deterministic form
    after one line of warning.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        for feature in ("NVLS", "COLLNET"):  # sums in the network may differ from call to call
            os.environ.setdefault(f"NCCL_{feature}_ENABLE", "0")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
