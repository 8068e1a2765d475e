"""Experts spread over processes: these compute what one does, and their checkpoints move to any other way and back."""

import json
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SPLIT_NUMBERS, in_processes, train
from small_run import ALONE, FOR_KERNELS, arguments, assert_close, assert_same, final, losses, train_here

from yaongi.model import Yaongi
from yaongi.train import program
from yaongi.train.checkpoint.model_folder import save_model
from yaongi.train.command_line import parse
from yaongi.train.optimizer import partition
from yaongi.train.session import Session
from yaongi.world import World, init_world

# Clipping is active, and the bias leaps by 5, so that in many steps one or two experts of four get no tokens.
FEW = (
    *("--micro-rows", "2", "--clip", "0.5", "--evaluate-every", "100", "--evaluate-rows", "1", "--sample-tokens", "0"),
    *("--bias-travel", "0", "--bias-rate", "5", "--log-every", "1", "--stop-after", "3"),
)
EXACT = (*FEW, "--dtype", "float64")
MEASURED = (*EXACT, "--sample-tokens", "2")
NARROW = (*FEW, "--dtype", "bfloat16", "--batch-tokens", "256", "--stop-after", "2")
SPREAD = ("--parallel", "experts")
MOVES = ("experts", "fsdp", "experts")  # of a run that one process began
FP8 = (*NARROW, "--model.precision.shared-experts", "fp8", "--model.precision.high-layers", "0")


def run(world: World, given: Sequence[str], out: Path, *more: str) -> None:
    """Train in a world that goes on."""
    command = [*given, "--out", str(out), *more]
    assert program.train(parse(command), world, command) == 0


def opened(world: World, given: Sequence[str], out: Path, *more: str) -> Session:
    """Return a run that goes on from its checkpoint."""
    session = Session(parse([*given, "--out", str(out), *more]), world)
    session.start()
    return session


def save_again(world: World, given: Sequence[str], out: Path, *more: str) -> None:
    """Go on with a run, save its step once more, and with several processes write the model."""
    with opened(world, given, out, *more) as session:
        session.save(wait=True)
        if world.size > 1:
            save_model(session.model, session.tokenizer, out / "model", world)


def two_processes(given: Sequence[str], base: Path) -> None:
    """Do all that the tests below look at."""
    partition.SPLIT_NUMBERS = SPLIT_NUMBERS
    world = init_world("cpu")
    run(world, given, base / "exact", *MEASURED, *SPREAD)
    for stop, recompute in (("1", "none"), ("3", "experts")):
        run(world, given, base / "pieces", *EXACT, *SPREAD, "--stop-after", stop, "--recompute", recompute)
    for number, way in enumerate(MOVES):
        save_again(world, given, base / "narrow", *NARROW, "--parallel", way)
        if world.is_main:
            torch.save(final(base / "narrow"), base / f"move{number}.pt")
    for way in ("replicate", "experts"):
        run(world, given, base / f"fp8-{way}", *FP8, "--parallel", way)
    for way in ("fsdp", "experts"):
        save_again(
            world, given, base / f"init-{way}", *NARROW, "--init", str(base / "narrow" / "model"), "--parallel", way
        )
    world.close()


def found(out: Path, event: str, key: str) -> list[Any]:
    """Return a value of all records of an event, in order."""
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record[key] for record in records if record["event"] == event]


@pytest.fixture(scope="module")
def two(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of what two processes did."""
    base = tmp_path_factory.mktemp("two")
    given = arguments(tokens, base / "run")
    run(ALONE, given, base / "narrow", *NARROW)
    torch.save(final(base / "narrow"), base / "begun.pt")
    done = in_processes(2, base / "log", two_processes, given, base)
    assert not any(done.codes), "\n".join(done.err)[-4000:]
    assert "Warning" not in "".join(done.err)
    return base


@pytest.fixture(scope="module")
def one(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same run in one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    run(ALONE, arguments(tokens, out), out, *MEASURED)
    return out


def test_two_processes_are_one(two: Path, one: Path) -> None:
    """Compare losses, norms, all tensors, what evaluations found, and the loads of experts, of which some were idle."""
    assert_close(two / "exact", one, loss=1e-12, tensor=1e-10)
    assert found(two / "exact", "step", "loads") == found(one, "step", "loads")
    assert any(found(one, "step", "experts_dead"))
    assert found(two / "exact", "start", "hosts") == [f"{socket.gethostname()} × 2"]
    assert found(two / "exact", "samples", "texts") == found(one, "samples", "texts")
    for got, wanted in zip(found(two / "exact", "evaluation", "bpb"), found(one, "evaluation", "bpb"), strict=True):
        assert got == pytest.approx(wanted, rel=1e-12)


def test_the_same_bits_in_two_pieces(two: Path) -> None:
    """Also where the second one recomputes the layers with experts, and so gathers tokens once more."""
    assert_same(two / "pieces", two / "exact")


def test_a_checkpoint_moves(two: Path, tokens: Path) -> None:
    """From one process to spread experts, to sharded weights and back, and to one again: every tensor to the bit."""
    begun = torch.load(two / "begun.pt")
    moved = [torch.load(two / f"move{number}.pt") for number in range(len(MOVES))]
    save_again(ALONE, arguments(tokens, two / "run"), two / "narrow", *NARROW)
    for tensors in (*moved, final(two / "narrow")):
        assert tensors.keys() == begun.keys()
        assert all(torch.equal(tensors[name], begun[name]) for name in begun)


def test_the_model_at_the_end_is_whole(two: Path) -> None:
    """Compare the folder that two processes wrote with the weights of one."""
    model, tensors = Yaongi.from_pretrained(two / "narrow" / "model", dtype=None), torch.load(two / "begun.pt")
    for name, parameter in model.named_parameters():
        wanted = tensors.get(f"optimizer/{name}/master", tensors.get(f"model/{name}"))
        assert wanted is not None, name
        assert torch.equal(parameter, wanted.to(parameter.dtype)), name


def test_a_run_from_a_model_folder(two: Path, tokens: Path) -> None:
    """Each process reads its part: sharded or spread, the first checkpoint is one process's to the bit."""
    given = arguments(tokens, two / "run")
    save_again(ALONE, given, two / "init-alone", *NARROW, "--init", str(two / "narrow" / "model"))
    wanted = final(two / "init-alone")
    for way in ("fsdp", "experts"):
        got = final(two / f"init-{way}")
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted), way


def four_processes(given: Sequence[str], base: Path) -> None:
    """Train on two nodes of two, whose experts have two owners each, and on one of four; change an expert on a rank."""
    partition.SPLIT_NUMBERS = SPLIT_NUMBERS
    world, two = init_world("cpu"), (*SPREAD, "--expert-parallel-degree", "2")
    run(world, given, base / "two", *EXACT, *two)
    run(world, given, base / "four", *EXACT, *SPREAD)
    run(world, given, base / "adamw", *EXACT, "--matrix-optimizer", "adamw", *two)
    with opened(world, given, base / "two", *EXACT, *two) as session:
        if world.rank == 3:
            session.model.get_parameter("backbone.layers.1.mixer.experts.up_proj").data[0, 0, 0] += 1
        with pytest.raises(ValueError, match="rank 3's weights differ from rank 1's at step 3: its GPU may be faulty"):
            session.save()
    world.close()


@pytest.mark.long
def test_four_processes(one: Path, tokens: Path, tmp_path: Path) -> None:
    """In one node or two they compute what one does; one goes on from either; a changed expert is noticed."""
    given = arguments(tokens, tmp_path / "run")
    done = in_processes(4, tmp_path / "log", four_processes, given, tmp_path)
    assert not any(done.codes), "\n".join(done.err)[-4000:]
    run(ALONE, given, tmp_path / "alone", *EXACT, "--matrix-optimizer", "adamw")
    assert_close(tmp_path / "adamw", tmp_path / "alone", loss=1e-12, tensor=1e-10)
    for name in ("two", "four"):
        assert_close(tmp_path / name, one, loss=1e-12, tensor=1e-10)
        before = final(tmp_path / name)
        save_again(ALONE, given, tmp_path / name, *EXACT)
        after = final(tmp_path / name)
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "train: --parallel experts must have 2 processes or more, got 1"),
        (
            ("--processes", "3"),
            "train: --expert-parallel-degree must be 2 or more and divide 4 experts and 3 processes, got 3",
        ),
        (
            ("--processes", "4", "--expert-parallel-degree", "1"),
            "train: --expert-parallel-degree must be 2 or more and divide 4 experts and 4 processes, got 1",
        ),
        (
            ("--processes", "2", "--model.pattern", "MMMM*"),
            "train: --parallel experts must have a model with experts, got the layers MMMM*",
        ),
        (
            ("--processes", "2", *FP8, "--model.precision.experts", "fp8"),
            "train: --parallel experts must have experts in bf16, got fp8",
        ),
        (
            ("--processes", "4", "--batch-tokens", "384"),
            "train: the rows of a batch must be a multiple of 4 processes, got 6",
        ),
        (
            ("--processes", "2", "--evaluate-tasks", "basics"),
            "train: --evaluate-tasks must be with --parallel replicate, got experts",
        ),
        (
            ("--processes", "2", "--parallel", "fsdp", "--expert-parallel-degree", "2"),
            "train: --expert-parallel-degree must go with --parallel experts, got fsdp",
        ),
    ],
    ids=["one process", "odd processes", "degree one", "no experts", "experts in fp8", "odd rows", "tasks", "fsdp"],
)
def test_what_is_refused(more: tuple[str, ...], message: str, tokens: Path, tmp_path: Path) -> None:
    """In one line, before a folder is made."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train_here(arguments(tokens, tmp_path / "run", *SPREAD, "--dry-run", *more))
    assert not (tmp_path / "run").exists()


def test_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a piece of nemotron-3-nano eight GPUs hold an eighth of the experts each, and own an eighth of all state."""
    more = ("--model.pattern", "ME*E", "--batch-tokens", str(1 << 20), "--micro-rows", "1", "--processes", "8", *SPREAD)
    assert train_here(["--preset", "nemotron-3-nano", "--plan-for", "h100", *more]) == 0
    printed = capsys.readouterr().out
    assert "8 processes, --parallel experts over 8\n" in printed
    whole, experts = float(re.findall(r", ([\d,]+) parameters", printed)[0].replace(",", "")), 2 * 128 * 2 * 2688 * 1856
    parts = {name: 1e9 * float(size) for name, size in re.findall(r"(\w+) ([\d.]+) GB", printed)}
    assert parts["weights"] == pytest.approx(2 * (whole - experts * 7 / 8), rel=0.01)
    assert parts["gradients"] == pytest.approx(4 * (whole - experts * 7 / 8), rel=0.01)
    assert parts["masters"] == pytest.approx(4 * whole / 8, rel=0.01)
    assert re.search(r"micro-batches \d+ %, tokens to experts \d+ %, update \d+ %, exchange \d+ %\n", printed)


def test_fp8(two: Path) -> None:
    """Compare with two processes that hold all experts: the same scales, sums in another order."""
    for (_, *got), (_, *wanted) in zip(losses(two / "fp8-experts"), losses(two / "fp8-replicate"), strict=True):
        assert got == pytest.approx(wanted, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tokens: Path, tmp_path: Path) -> None:
    """Run the kernels, and NCCL in the recorded graph: the same bits twice, the losses of one GPU, which goes on."""
    more = ("--device", "cuda", "--sample-tokens", "3", *FOR_KERNELS)

    def on_gpus(count: int, name: str, *more_still: str) -> None:
        given = arguments(tokens, tmp_path / name, *more, *more_still)
        done = in_processes(count, tmp_path / f"{name}-log", train, given)
        assert not any(done.codes), "\n".join(done.err)[-4000:]

    on_gpus(1, "one")
    for name in ("first", "second"):
        on_gpus(2, name, *SPREAD, "--checkpoint-every", "2")
    on_gpus(2, "both", *SPREAD, "--stop-after", "3")
    on_gpus(1, "both")
    assert_same(tmp_path / "second", tmp_path / "first")
    for name in ("first", "both"):
        for got, wanted in zip(losses(tmp_path / name), losses(tmp_path / "one"), strict=True):
            assert got[:2] == pytest.approx(wanted[:2], abs=0.05), name
