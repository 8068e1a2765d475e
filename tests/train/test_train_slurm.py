"""docs/train.slurm with stand-ins for Slurm's programs: the command of the nodes, and what a signal does."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_run import ROOT

SRUN = """#!/bin/sh
echo "$@" >srun
while [ ! -e {out}/stop ] && [ ! -e end ]; do sleep 0.02; done
exit "$(cat end 2>/dev/null || echo 0)"
"""
SCONTROL = """#!/bin/sh
[ "$1" = requeue ] && echo "$2" >requeued || printf 'gpu1\\ngpu2\\n'
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Return a repository's folder with stand-ins, and a run's folder in it."""
    for folder in (".venv/bin", "bin", "run"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for name, text in (("srun", SRUN.format(out=tmp_path / "run")), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    shutil.copy(ROOT / "docs" / "train.slurm", tmp_path)
    return tmp_path


def submitted(job: Path, *words: str) -> "subprocess.Popen[str]":
    """Start the script as Slurm does on the first of two nodes of eight GPUs."""
    slurm = {"JOB_ID": "17", "JOB_NODELIST": "gpu[1-2]", "NNODES": "2", "GPUS_ON_NODE": "8", "CPUS_ON_NODE": "64"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    return subprocess.Popen(
        ["bash", "train.slurm", *words],
        cwd=job,
        env={**os.environ, **environment, "PATH": f"{job / 'bin'}:{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not (path.exists() and path.read_text()) and time.monotonic() < end:
        time.sleep(0.02)


@pytest.mark.parametrize("option", ["--out {}", "--out={}"])
def test_a_job_that_runs_out_of_time(job: Path, option: str) -> None:
    """The signal asks the run to stop, and when it has, the job is submitted again."""
    words = option.format(job / "run").split()
    with submitted(job, "--preset", "yaongi-4b", *words) as process:
        wait_for(job / "srun")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert (job / "srun").read_text() == (
        "--ntasks-per-node 1 torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-id 17 --rdzv-backend c10d "
        f"--rdzv-endpoint gpu1:29500 -m yaongi.train --preset yaongi-4b {' '.join(words)}\n"
    )
    assert (job / "run" / "stop").exists()
    assert (job / "requeued").read_text() == "17\n"


def test_a_run_that_fails(job: Path) -> None:
    """Its exit code is the job's, which is not submitted again."""
    (job / "end").write_text("3")
    with submitted(job, "--out", str(job / "run")) as process:
        assert process.wait(timeout=30) == 3
    assert not (job / "requeued").exists()


def test_a_job_without_a_folder(job: Path) -> None:
    with submitted(job, "--preset", "yaongi-4b") as process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors == "train.slurm: --out must be given, a folder that all nodes see\n"
    assert not (job / "srun").exists()
