"""Two processes with weights sharded by FSDP2 against one: the same losses and weights; one goes on from two."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from small_run import FOR_KERNELS, arguments, config_of, environment, final_tensors, losses, run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yaongi.data.tokenizer import Tokenizer
from yaongi.model.initialize import Part, PartOf
from yaongi.train.build import build_model, materialize
from yaongi.train.config import Config
from yaongi.train.optimizer.engine import make_engine
from yaongi.world import init_world

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


class Allocated(TorchDispatchMode):
    """A context that adds up the bytes of all storages made within it, freed again or not."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given, found = (
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tree_leaves(tree) if _has_memory(t)}
            for tree in ((args, kwargs), made)
        )
        self.total += sum(size for place, size in found.items() if place not in given)
        return made


def _has_memory(tensor: object) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta  # type: ignore[attr-defined]


def begin(config: Config, tokens: Path) -> None:
    """Check that what each process makes of a model is its part of a whole one, and takes no more memory than that."""
    world, tokenizer, dtype = init_world("cpu"), Tokenizer.load(tokens / "tokenizer"), torch.bfloat16
    whole = build_model(config, tokenizer, world.device, dtype=dtype)
    for parallel in ("fsdp", "experts"):
        model = build_model(config, tokenizer, "meta", dtype=dtype)
        parts: dict[str, Part] = {}
        allocated = Allocated()

        def fill(part_of: PartOf, model: Any = model, parts: Any = parts) -> None:
            assert all(p.is_meta for p in model.parameters())
            materialize(model, config, tokenizer, world.device, part_of)
            parts |= {name: part_of(name, p) for name, p in model.named_parameters()}

        with allocated:
            make_engine(model, config.train, world, parallel, world.size, dtype, fill)
        for name, parameter in whole.named_parameters():
            part = parts[name]
            assert part.rows == len(parameter)
            wanted = parameter[part.first : part.first + len(part.tensor)]
            assert torch.equal(part.tensor, wanted.to(part.tensor.dtype)), name
        for name, buffer in whole.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
        if parallel == "fsdp":  # of experts the buffers for gradients come in addition
            assert allocated.total < 4 * sum(p.numel() for p in whole.parameters())
    world.close()


def test_each_process_begins_with_its_part_alone(tokens: Path, tmp_path: Path) -> None:
    """Neither sharded weights nor spread experts are whole anywhere, and they are one process's to the bit."""
    config = config_of(tokens, tmp_path / "run")
    done = in_processes(2, tmp_path / "log", begin, config, tokens)
    assert not any(done.codes), "\n".join(done.err)[-3000:]


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
