"""What a run was started with: plan, command, code, versions, machine and text."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

import yaongi
from yaongi.data.epochs import count_epochs
from yaongi.data.row_loader import RowLoader
from yaongi.train.metrics.records import Metrics
from yaongi.train.plan.run_plan import Plan


def record_start(
    metrics: Metrics, plan: Plan, loader: RowLoader, resumed_from: int | None, places: Sequence[str]
) -> None:
    """Record the plan of a new run, and of every start the environment and how much there is of each text.

    A run that is at its end already is left as it is.

    Args:
        places: the machine of each process, and its GPU: sums have the same bits on the same hosts in the same order.
    """
    if resumed_from == plan.steps:
        return
    if resumed_from is None:
        metrics.write("plan", 0, **plan.record())
    epochs = count_epochs(loader.tokens, loader.mixture.shares, plan.tokens)
    sources = [{"name": stream.name, "there": stream.there, "wanted": stream.wanted} for stream in epochs]
    hosts = Counter(place.split(",")[0] for place in places)
    several = {"hosts": ", ".join(f"{host} × {n}" for host, n in hosts.items())} if len(places) > 1 else {}
    metrics.write("start", resumed_from or 0, **environment(), **several, sources=sources)


def environment() -> dict[str, str]:
    """Return the command, the code's commit (empty if it isn't a checkout), versions, and the machine."""
    versions = {"yaongi": yaongi.__version__, "python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # the references need no Triton
        versions["triton"] = importlib.metadata.version("triton")
    if torch.version.cuda:
        versions["CUDA"] = torch.version.cuda
    if torch.version.cuda and torch.distributed.is_nccl_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    cores = f"{len(os.sched_getaffinity(0))} cores" if hasattr(os, "sched_getaffinity") else f"{os.cpu_count()} cores"
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return {
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "commit": _commit(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "machine": ", ".join([*gpu, f"{platform.system()} {platform.machine()}", cores]),
    }


def _commit() -> str:
    """Return the checkout's commit, and whether files were changed since; empty outside a checkout."""
    root = Path(yaongi.__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=, with changes", "--exclude=*", "--abbrev=12"]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
