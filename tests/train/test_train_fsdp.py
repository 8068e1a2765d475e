"""Two processes with weights sharded by FSDP2 against one: the same losses and weights; one goes on from two."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import FOR_KERNELS, arguments, environment, final_tensors, losses, run

MORE = ("--sample-tokens", "0", "--micro-rows", "2", "--parallel", "fsdp")


def run_two(tokens: Path, out: Path, *more: str) -> None:
    """Train with two processes on gloo."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [*launcher, "-m", "yaongi.train", *arguments(tokens, out, *MORE, *more)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def two(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with two processes, in float64."""
    out = tmp_path_factory.mktemp("two") / "run"
    run_two(tokens, out, "--dtype", "float64")
    return out


@pytest.fixture(scope="module")
def one(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same run with one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    done = run(tokens, out, *MORE, "--dtype", "float64")
    assert done.returncode == 0, done.stderr
    return out


def assert_alike(mine: Path, theirs: Path) -> None:
    """Compare the loss curves to 1e-10, and every tensor of the last checkpoints."""
    for (step, *values), (_, *wanted) in zip(losses(mine), losses(theirs), strict=True):
        assert values == pytest.approx(wanted, rel=1e-10), step
    got, expected = final_tensors(mine), final_tensors(theirs)
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        if not name.startswith("rng"):
            torch.testing.assert_close(tensor, expected[name], rtol=1e-7, atol=1e-9, msg=name)


def test_two_processes_are_one(one: Path, two: Path) -> None:
    """Compare runs that use FSDP2, Teon on gathered matrices, and sparse table gradients."""
    assert_alike(two, one)


@pytest.mark.long
def test_idle_experts_and_a_balance_in_leaps(tokens: Path, tmp_path: Path) -> None:
    """Compare runs whose bias leaps by 5, so that in many steps one or two experts of four get no tokens."""
    leaps = ("--bias-travel", "0", "--bias-rate", "5", "--dtype", "float64", "--stop-after", "6", "--log-every", "1")
    run_two(tokens, tmp_path / "two", *leaps)
    assert run(tokens, tmp_path / "one", *MORE, *leaps).returncode == 0
    records = map(json.loads, (tmp_path / "one" / "metrics.jsonl").read_text().splitlines())
    assert sum(r["experts_dead"] > 0 for r in records if r["event"] == "step") >= 3
    assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.long
def test_float32(tokens: Path, tmp_path: Path) -> None:
    """Compare the loss curve to 1e-5 in float32, the usual dtype on a CPU."""
    run_two(tokens, tmp_path / "two", "--stop-after", "5")
    assert run(tokens, tmp_path / "one", *MORE, "--stop-after", "5").returncode == 0
    for (_, loss, _), (_, wanted, _) in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert loss == pytest.approx(wanted, abs=1e-5)


@pytest.mark.long
def test_another_number_of_processes(tokens: Path, one: Path, tmp_path: Path) -> None:
    """Begin with two processes and end with one: the same data in the same order, so the same losses."""
    run_two(tokens, tmp_path / "run", "--dtype", "float64", "--stop-after", "5")
    sums = (tmp_path / "run" / "checkpoints" / "step-00000005" / "SHA256SUMS").read_text()
    files = [".metadata", "__0_0.distcp", "__1_0.distcp", "run.json", "tokenizer.model"]
    assert [line.split()[1] for line in sums.splitlines()] == files
    done = run(tokens, tmp_path / "run", *MORE, "--dtype", "float64")
    assert done.returncode == 0, done.stderr
    assert "resumed from step 5" in done.stdout
    assert_alike(tmp_path / "run", one)


@pytest.mark.long
def test_one_begins_two_end(tokens: Path, one: Path, tmp_path: Path) -> None:
    """Begin with one process and end with two."""
    assert run(tokens, tmp_path / "run", *MORE, "--dtype", "float64", "--stop-after", "5").returncode == 0
    run_two(tokens, tmp_path / "run", "--dtype", "float64")
    assert_alike(tmp_path / "run", one)


@pytest.mark.long
def test_bfloat16(tokens: Path, tmp_path: Path) -> None:
    """Train with float32 shards as master weights; the loss falls as it does with one process."""
    run_two(tokens, tmp_path / "two", "--dtype", "bfloat16")
    assert run(tokens, tmp_path / "one", *MORE, "--dtype", "bfloat16").returncode == 0
    assert losses(tmp_path / "two")[-1][1] == pytest.approx(losses(tmp_path / "one")[-1][1], abs=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_two_gpus(tokens: Path, tmp_path: Path, dtype: str, tolerance: float) -> None:
    """Run the kernels with NCCL: the losses are those of one GPU, and a run of two can be resumed with one."""
    more = ("--device", "cuda", "--dtype", dtype, *FOR_KERNELS, "--checkpoint-every", "2")
    assert run(tokens, tmp_path / "one", *MORE, *more).returncode == 0
    wanted = losses(tmp_path / "one")
    run_two(tokens, tmp_path / "two", *more)
    run_two(tokens, tmp_path / "both", *more, "--stop-after", "3")
    done = run(tokens, tmp_path / "both", *MORE, *more)
    assert "resumed from step 3" in done.stdout, done.stderr
    for out in ("two", "both"):
        got = losses(tmp_path / out)
        assert [step for step, *_ in got] == [step for step, *_ in wanted]
        for (step, loss, _), (_, expected, _) in zip(got, wanted, strict=True):
            assert loss == pytest.approx(expected, abs=tolerance), (out, step)
