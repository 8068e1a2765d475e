"""Programs of the package as a user starts them, without the seconds that their imports take.

A server that has imported torch and the trainer forks each of them. What is told by the environment at an import of
another package (the hub's address, say) needs `python -m` itself.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["yaongi.train.session", "yaongi.train.program", "tyro", "tensorboard"])


def run_module(
    module: str,
    *arguments: object,
    typed: str = "",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> "subprocess.CompletedProcess[str]":
    """Run `python -m module arguments` on one thread, and return its exit code and what it printed.

    Args:
        typed: its standard input.
        cwd, env: its folder and environment; none: this process's.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds.
    """
    words = [module, *map(str, arguments)]
    with TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        for path, content in zip(streams, (typed, "", ""), strict=True):
            path.write_text(content)
        process = CONTEXT.Process(target=_run, args=(words, streams, cwd or Path.cwd(), dict(env or os.environ)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        output, errors = (path.read_text() for path in streams[1:])
    assert process.exitcode is not None
    return subprocess.CompletedProcess(words, process.exitcode, output, errors)


def _run(words: list[str], streams: list[Path], cwd: Path, environment: dict[str, str]) -> None:
    """Be the program, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams):
        file = os.open(path, os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.argv, sys.orig_argv = ["", *words[1:]], [sys.executable, "-m", *words]
    sys.path.insert(0, str(cwd))
    atexit._clear()
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
