"""Training in several processes on gloo, forked by the server of `programs`."""

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programs import CONTEXT

SECONDS = 240  # that a group of processes may take
SPLIT_NUMBERS = 1 << 10  # of a matrix whose rows have owners: so few that a tiny embedding is such a one


@dataclass(frozen=True)
class Done:
    """What the processes of a group left: by rank."""

    codes: list[int | None]
    out: list[str]
    err: list[str]


def in_processes(count: int, folder: Path, function: Callable[..., Any], *given: Any) -> Done:
    """Call `function(*given)` in `count` processes that find each other as those of torchrun do.

    Args:
        folder: where their output is kept.
        function: importable by name; a SystemExit gives the exit code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = [(folder / f"{rank}.out", folder / f"{rank}.err") for rank in range(count)]
    processes = [
        CONTEXT.Process(target=_work, args=(rank, count, port, out, err, function, given))
        for rank, (out, err) in enumerate(names)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    read = [tuple(path.read_text() for path in pair) for pair in names]
    return Done([process.exitcode for process in processes], [out for out, _ in read], [err for _, err in read])


def _work(
    rank: int, count: int, port: int, out: Path, err: Path, function: Callable[..., Any], given: Sequence[Any]
) -> None:
    import torch

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    with out.open("w") as stdout, err.open("w") as stderr:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            function(*given)


def train(arguments: Sequence[str]) -> None:
    """Run `python -m yaongi.train`."""
    from yaongi.train.__main__ import main
    from yaongi.train.optimizer import partition

    partition.SPLIT_NUMBERS = SPLIT_NUMBERS
    sys.argv[1:] = arguments
    main()
