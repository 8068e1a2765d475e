"""What goes wrong on some of several processes: one line says it, and nothing is lost."""

import datetime
import json
import os
import re
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Done, in_processes, train
from small_run import arguments

from yaongi import world
from yaongi.train.distributed import agreement, errors, watch
from yaongi.train.session import Session
from yaongi.world import World

FEW = ("--sample-tokens", "0", "--micro-rows", "2", "--evaluate-every", "100", "--stop-after", "2")


def rank() -> int:
    return int(os.environ["RANK"])


def other_data(given: Sequence[str]) -> None:
    """Train with other shards on the second process."""
    folder = Path(given[given.index("--data") + 1])
    if rank() == 1:
        given = [f"{folder}-other" if argument == str(folder) else argument for argument in given]
    train(given)


def other_folder(given: Sequence[str]) -> None:
    """Train in another folder on the second process."""
    agreement.PATIENCE = 1.0
    folder = given[given.index("--out") + 1]
    train([f"{folder}-other" if argument == folder and rank() == 1 else argument for argument in given])


def spoiled(method: str, spoil: Callable[[Session], None], given: Sequence[str]) -> None:
    """Train, and spoil something on the second process before each call of a session's method."""
    usual = getattr(Session, method)

    def call(session: Session, *args: Any, **kwargs: Any) -> Any:
        if rank() == 1:
            spoil(session)
        return usual(session, *args, **kwargs)

    setattr(Session, method, call)
    train(given)


def flip_a_bit(session: Session) -> None:
    """Change the last bit of one weight."""
    weight = session.model.lm_head.weight.detach().view(torch.int32).flatten()
    weight[7] ^= 1


def run_out(session: Session) -> None:
    """Fail as a GPU without memory does, in the second step."""
    if session.step == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has none")


def fault(session: Session) -> None:
    """Fail as a faulty program does, in the second step."""
    if session.step == 1:
        raise RuntimeError("a fault of the program")


def faulty(given: Sequence[str]) -> None:
    """Train with a second process that fails, and with files for torchrun's summary as torchrun names them."""
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{given[given.index('--out') + 1]}-error-{rank()}.json"
    spoiled("train_step", fault, given)


def hang(session: Session) -> None:
    """Get no further for some seconds before the second step."""
    if session.step == 1:
        time.sleep(8)


def hanging(given: Sequence[str]) -> None:
    """Train with a second process that hangs, watched impatiently."""
    watch.LEAST, watch.STEPS, watch.POLL = 3.0, 0, 0.1
    spoiled("train_step", hang, given)


def without_room(given: Sequence[str]) -> None:
    """Train with a second process whose files can't grow, as on a full disk."""
    if rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    train(given)


def impatient() -> None:
    """Leave the others two seconds from the second step on."""
    world.LATER_STEPS, world.STEPS, errors.PATIENCE = datetime.timedelta(seconds=2), 0, 1.0


def hanging_too_long(given: Sequence[str]) -> None:
    """Train with a second process that hangs for longer than a step may."""
    impatient()
    spoiled("train_step", hang, given)


def slow_parts(given: Sequence[str]) -> None:
    """Train where the first step, an evaluation and a push each take one process longer than a later step may."""
    impatient()
    finish = Session.finish

    def slower(method: str, now: Callable[[Session], bool]) -> None:
        usual = getattr(Session, method)

        def call(session: Session, *args: Any) -> Any:
            time.sleep(3 if now(session) else 0)
            return usual(session, *args)

        setattr(Session, method, call)

    def finish_soon(session: Session) -> None:
        assert session.world.host is not None
        session.world.host.set_timeout(datetime.timedelta(seconds=2))
        finish(session)

    slower("train_step", lambda session: rank() == 1 and session.step == 0)
    slower("evaluate", lambda session: rank() == 1 and session.step == 1)
    slower("_push", lambda session: True)
    Session.finish = finish_soon  # type: ignore[method-assign]
    train(given)


def said(done: Done, codes: list[int]) -> list[str]:
    """Return the lines on standard error that are no gloo warnings."""
    assert done.codes == codes
    return [line for text in done.err for line in text.splitlines() if not line.startswith("[")]


def test_other_data(tokens: Path, tmp_path: Path) -> None:
    for name in ("data", "data-other"):
        shutil.copytree(tokens, tmp_path / name)
    manifest = tmp_path / "data-other" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    done = in_processes(2, tmp_path / "log", other_data, arguments(tmp_path / "data", tmp_path / "run", *FEW))
    (line,) = said(done, [1, 1])
    assert line.startswith("error: train: all processes must have the same data, got rank 1 with other data (manifest ")
    assert not (tmp_path / "run").exists()


def test_another_folder(tokens: Path, tmp_path: Path) -> None:
    done = in_processes(2, tmp_path / "log", other_folder, arguments(tokens, tmp_path / "run", *FEW))
    (line,) = said(done, [1, 1])
    assert line.startswith(f"error: train: --out {tmp_path / 'run'}")
    assert line.endswith("(rank 1): put it on a file system that all nodes share")


def test_other_weights(tokens: Path, tmp_path: Path) -> None:
    """A flipped bit is noticed before a checkpoint is written, and the one before stays."""
    given = arguments(tokens, tmp_path / "run", *FEW)
    assert in_processes(2, tmp_path / "log", train, [*given, "--stop-after", "1"]).codes == [0, 0]
    done = in_processes(2, tmp_path / "log", spoiled, "save", flip_a_bit, given)
    (line,) = said(done, [1, 1])
    assert line == (
        "error: train: rank 1's weights differ from rank 0's at step 2: its GPU may be faulty; step 2 is not saved"
    )
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert kept == ["step-00000001"]


def test_one_process_out_of_memory(tokens: Path, tmp_path: Path) -> None:
    """Its line names it; the others, whose collectives fail, say nothing."""
    done = in_processes(2, tmp_path / "log", spoiled, "train_step", run_out, arguments(tokens, tmp_path / "run", *FEW))
    (line,) = said(done, [1, 1])
    assert line.startswith("error: rank 1 of 2 (")
    assert "out of GPU memory in" in line
    assert line.endswith("needed 2.00 GiB: try --micro-rows 1")


def test_a_fault_on_one_process(tokens: Path, tmp_path: Path) -> None:
    """Its traceback is printed once, and torchrun's summary is told of it alone."""
    done = in_processes(2, tmp_path / "log", faulty, arguments(tokens, tmp_path / "run", *FEW))
    assert done.codes == [1, 1]
    assert "".join(done.err).count("RuntimeError: a fault of the program") == 1
    (file,) = tmp_path.glob("run-error-*.json")
    assert file.name == "run-error-1.json"
    assert "a fault of the program" in json.loads(file.read_text())["message"]["message"]


def test_a_process_that_hangs(tokens: Path, tmp_path: Path) -> None:
    """Each says where it is; the one that is elsewhere is the cause. The run goes on."""
    done = in_processes(2, tmp_path / "log", hanging, arguments(tokens, tmp_path / "run", *FEW))
    lines = [line for line in said(done, [0, 0]) if line.endswith(", after step 1")]
    form = r'warning: rank (\d) \(.*\): no progress for [3-9] s in "(.*)", after step 1'
    found = [re.fullmatch(form, line) for line in lines]
    assert {m[1]: m[2] for m in found if m} == {"0": "the count of targets", "1": "the next step"}, lines


def test_a_write_that_fails_on_one_process(tokens: Path, tmp_path: Path) -> None:
    """All end, one says why, and the checkpoint before stays."""
    given, kept = arguments(tokens, tmp_path / "run", *FEW), tmp_path / "run" / "checkpoints"
    assert in_processes(2, tmp_path / "log", train, [*given, "--stop-after", "1"]).codes == [0, 0]
    done = in_processes(2, tmp_path / "log", without_room, given)
    (line,) = said(done, [1, 1])
    assert line.startswith("error: checkpoint: step 2 could not be saved: ")
    assert line.endswith(f"; the last checkpoint is {kept / 'step-00000001'}")
    assert [path.name for path in kept.iterdir() if path.is_dir()] == ["step-00000001"]


def test_a_process_that_hangs_too_long(tokens: Path, tmp_path: Path) -> None:
    """Later steps wait less long than the first one: then a line names the process that did not come."""
    done = in_processes(2, tmp_path / "log", hanging_too_long, arguments(tokens, tmp_path / "run", *FEW))
    assert said(done, [1, 1]) == [f"error: rank 1 of 2 ({socket.gethostname()}) did not come within 2s"]


def test_what_may_take_longer_than_a_step(tokens: Path, tmp_path: Path) -> None:
    given = arguments(tokens, tmp_path / "run", *FEW, "--tokens", "1024", "--evaluate-every", "1")
    assert said(in_processes(2, tmp_path / "log", slow_parts, given), [0, 0]) == []
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("option", ["--no-such-option", "--steps"])
def test_a_wrong_option(option: str, tokens: Path, tmp_path: Path) -> None:
    done = in_processes(3, tmp_path / "log", train, arguments(tokens, tmp_path / "run", option))
    assert done.codes == [2, 2, 2]
    assert option in done.err[0] + done.out[0]
    assert done.err[1:] + done.out[1:] == [""] * 4


def test_the_flight_recorder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On GPUs the line of a process that hangs says where it writes; what the user has set stays."""
    mine = {"WORLD_SIZE": "2", "TORCH_FR_BUFFER_SIZE": "7"}
    monkeypatch.setattr(os, "environ", mine)
    watch.record_collectives(tmp_path)
    assert mine == {
        "WORLD_SIZE": "2",
        "TORCH_FR_BUFFER_SIZE": "7",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/nccl/rank_",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    monkeypatch.setattr(watch, "LEAST", 0.05)
    monkeypatch.setattr(watch, "POLL", 0.01)
    printed = ""
    with watch.Watch(World(1, 2, torch.device("cuda", 1)), tmp_path, lambda: (3, "the update")):
        end = time.monotonic() + 30
        while not printed and time.monotonic() < end:
            time.sleep(0.01)
            printed = capsys.readouterr().err
    assert 'GPU 1): no progress for 0 s in "the update", after step 3; if NCCL gives up, the last coll' in printed
    assert printed.endswith(f"are written to {tmp_path}/nccl\n")
    assert (tmp_path / "nccl").is_dir()
