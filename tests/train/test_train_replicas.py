"""Replicated weights with an owned optimizer: two, three and four processes compute what one does."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import study_processes
import torch
from processes import SPLIT_NUMBERS, in_processes, train
from small_run import FOR_KERNELS, arguments, assert_close, assert_same, final, losses

from yaongi.train.command_line import parse
from yaongi.train.optimizer import partition
from yaongi.train.session import Session
from yaongi.world import init_world

# Clipping is active; pairs of in_proj and out_proj go to one owner; three processes share four experts and eight
# micro-batches.
MORE = ("--sample-tokens", "0", "--micro-rows", "1", "--clip", "0.5", "--stacked", "qkv,mamba", "--stop-after", "5")
FEW = (*MORE, "--evaluate-every", "100")


def run(count: int, tokens: Path, out: Path, *more: str, few: tuple[str, ...] = FEW) -> None:
    """Train with `count` processes."""
    done = in_processes(count, out.parent / f"{out.name}-log", train, arguments(tokens, out, *few, *more))
    assert not any(done.codes), "\n".join(done.err)[-4000:]
    assert "Warning" not in "".join(done.err)


@pytest.fixture(scope="module")
def runs(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return the folders of runs in float64, by number of processes."""
    folders = {count: tmp_path_factory.mktemp(f"of{count}") / "run" for count in (1, 2, 3, 4)}
    for count, out in folders.items():
        run(count, tokens, out, "--dtype", "float64")
    return folders


@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_processes_are_one(runs: dict[int, Path], count: int) -> None:
    assert_close(runs[count], runs[1], loss=1e-12, tensor=1e-10)


def test_the_same_bits_in_two_pieces(runs: dict[int, Path], tokens: Path, tmp_path: Path) -> None:
    for stop in ("3", "5"):
        run(3, tokens, tmp_path / "run", "--dtype", "float64", "--stop-after", stop)
    assert_same(tmp_path / "run", runs[3])


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_narrower(dtype: str, tolerance: float, tokens: Path, tmp_path: Path) -> None:
    for count in (1, 3):
        run(count, tokens, tmp_path / str(count), "--dtype", dtype)
    for (step, loss, _), (_, wanted, _) in zip(losses(tmp_path / "3"), losses(tmp_path / "1"), strict=True):
        assert loss == pytest.approx(wanted, rel=tolerance), step


def test_idle_experts(tokens: Path, tmp_path: Path) -> None:
    """Compare runs whose bias leaps by 5, so that in many steps one or two experts of four get no tokens."""
    leaps = ("--bias-travel", "0", "--bias-rate", "5", "--dtype", "float64", "--log-every", "1")
    for count in (1, 3):
        run(count, tokens, tmp_path / str(count), *leaps)
    assert_close(tmp_path / "3", tmp_path / "1", loss=1e-12, tensor=1e-10)
    records = map(json.loads, (tmp_path / "3" / "metrics.jsonl").read_text().splitlines())
    assert sum(r["experts_dead"] > 0 for r in records if r["event"] == "step") >= 2


def save_again(arguments: Sequence[str]) -> None:
    """Resume a run, and save its step once more."""
    partition.SPLIT_NUMBERS = SPLIT_NUMBERS
    world = init_world("cpu")
    session = Session(parse(arguments), world)
    session.start()
    with session:
        session.save(wait=True)
    world.close()


def test_a_checkpoint_moves_between_numbers_of_processes(tokens: Path, tmp_path: Path) -> None:
    """Begin with two; one, three and four, and two with sharded weights, load and save every tensor to the bit."""
    out, more = tmp_path / "run", ("--dtype", "bfloat16")
    run(2, tokens, out, *more, "--stop-after", "2")
    wanted = final(out)
    for count, parallel in ((1, "auto"), (3, "auto"), (2, "fsdp"), (4, "auto")):
        asked = arguments(tokens, out, *FEW, *more, "--parallel", parallel)
        done = in_processes(count, tmp_path / "log", save_again, asked)
        assert not any(done.codes), "\n".join(done.err)[-4000:]
        assert f"resumed from step 2 of {out}" in done.out[0]
        got = final(out)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    run(3, tokens, out, *more, "--stop-after", "3")
    assert [step for step, *_ in losses(out)] == [1, 2, 3]


def measure(*given: str) -> None:
    """Run the study that measures one process and several."""
    sys.argv[1:] = given
    study_processes.main()


@pytest.mark.long
def test_the_study_of_processes(tmp_path: Path) -> None:
    """Run it as on GPUs, on the smallest preset: every figure is there, and two runs have the same bits."""
    given = ("--preset", "yaongi-tiny", "--batch-tokens", "1024", "--steps", "1", "--bits", "1")
    done = in_processes(2, tmp_path / "log", measure, *given, "--out", str(tmp_path / "figures.json"))
    assert not any(done.codes), "\n".join(done.err)[-4000:]
    assert "two runs have the same bits: yes" in done.out[0]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["alone"]) == 2
    assert all(figures["together"][name] > 0 for name in ("seconds", "reduce_gradients", "gather_weights", "optimizer"))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
def test_several_gpus(count: int, tokens: Path, tmp_path: Path) -> None:
    """Run the kernels with NCCL: the same bits twice, the losses of one GPU, checkpoints that move from and to one."""
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    more = ("--device", "cuda", "--sample-tokens", "3", *FOR_KERNELS)
    run(1, tokens, tmp_path / "one", *more, few=())
    for name in ("first", "second"):
        run(count, tokens, tmp_path / name, *more, "--checkpoint-every", "2", few=())
    assert_same(tmp_path / "second", tmp_path / "first")
    for before, after in ((1, count), (count, 1)):
        out = tmp_path / f"from{before}"
        run(before, tokens, out, *more, "--stop-after", "3", few=())
        run(after, tokens, out, *more, few=())
    for name in ("first", f"from{count}", "from1"):
        got, wanted = losses(tmp_path / name), losses(tmp_path / "one")
        assert [step for step, *_ in got] == [step for step, *_ in wanted]
        for (step, loss, _), (_, expected, _) in zip(got, wanted, strict=True):
            assert loss == pytest.approx(expected, abs=0.05), (name, step)
