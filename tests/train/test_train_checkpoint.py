"""Checkpoints are complete or absent, and a save that fails says so."""

import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_module
from small_run import ALONE, arguments, environment, final_tensors, losses, run, session_of
from torch.distributed.checkpoint import FileSystemWriter

from yaongi.train.checkpoint.checkpoints import Checkpoints, DamagedError, read_meta
from yaongi.world import World

Tensors = dict[str, dict[str, torch.Tensor]]
LONG = pytest.mark.long
CHANGED = "step-00000004 is damaged: __0_0.distcp has changed since it was saved"


def tensors(value: float) -> Tensors:
    """Return a state of two tensors filled with `value`."""
    return {"model": {"a": torch.full((100, 10), value), "b": torch.full((3,), value, dtype=torch.bfloat16)}}


def checkpoints(folder: Path, **keep: int) -> Checkpoints:
    """Return the checkpoints of an empty folder."""
    made = Checkpoints(folder, ALONE, **keep)
    made.prepare()
    return made


def test_there_and_back(tmp_path: Path) -> None:
    """Check that a checkpoint holds the values at the time of `save`, although they changed while it was written."""
    saved = checkpoints(tmp_path)
    state = tensors(1.5)
    saved.save(7, state, {"step": 7})
    for tensor in state["model"].values():
        tensor.zero_()
    path = saved.wait()
    assert path is not None
    assert path == saved.latest()
    assert read_meta(path) == {"step": 7}
    loaded = tensors(0.0)
    saved.load(path, loaded)
    assert all(torch.equal(loaded["model"][n], t) for n, t in tensors(1.5)["model"].items())


def test_old_ones_go(tmp_path: Path) -> None:
    """Keep the last two checkpoints, and those of every tenth step."""
    saved = checkpoints(tmp_path, keep_last=2, keep_every=10)
    for step in (5, 10, 15, 20, 25):
        saved.save(step, tensors(step), {})
        saved.wait()
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-{s:08d}" for s in (10, 20, 25)]
    assert (tmp_path / "latest").read_text() == "step-00000025"


def test_saves_again_into_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save twice into the same staging memory, as on a GPU, while the tensors change during the write."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    saved = Checkpoints(tmp_path, World(0, 1, torch.device("cuda")))
    saved.prepare()
    for step in (1, 2, 3):
        changing = tensors(step)
        saved.save(step, changing, {})
        changing["model"]["a"].zero_()
        path, loaded = saved.wait(), tensors(0.0)
        assert path is not None
        saved.load(path, loaded)
        assert all(torch.equal(loaded["model"][n], t) for n, t in tensors(step)["model"].items())


def test_room_is_made_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the first save copies into reserved memory and allocates none."""
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tensor.numel()), tensor)[1])
    saved = Checkpoints(tmp_path, World(0, 1, torch.device("cuda")))
    saved.prepare()
    saved.reserve(tensors(0.0))
    saved.reserve(tensors(0.0))
    for step in (1, 2):
        saved.save(step, tensors(step), {})
        path, loaded = saved.wait(), tensors(0.0)
        assert path is not None
        saved.load(path, loaded)
        assert all(torch.equal(loaded["model"][n], t) for n, t in tensors(step)["model"].items())
        assert sorted(pinned) == [3, 1000]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_host_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """Report missing host memory in one line at the save, reserved ahead or not, and keep earlier checkpoints."""

    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nand much more")

    saved = checkpoints(tmp_path)
    saved.save(1, tensors(1), {})
    saved.wait()
    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    full = Checkpoints(tmp_path, World(0, 1, torch.device("cuda")))
    if ahead:
        full.reserve(tensors(2))
    with pytest.raises(OSError, match=r"page-locked memory of the host, got CUDA error: out of memory$"):
        full.save(2, tensors(2), {})
    assert full.latest() == tmp_path / "step-00000001"


def test_unfinished_ones_go(tmp_path: Path) -> None:
    """Ignore the leftovers of a killed save; without `latest` take the newest complete checkpoint."""
    saved = checkpoints(tmp_path)
    saved.save(1, tensors(1), {})
    saved.wait()
    (tmp_path / "step-00000002.tmp").mkdir()
    (tmp_path / "latest").unlink()
    again = checkpoints(tmp_path)
    assert again.latest() == tmp_path / "step-00000001"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the message names the missing space and the last checkpoint."""
    saved = checkpoints(tmp_path)
    saved.save(1, tensors(1), {})
    saved.wait()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 100))
    with pytest.raises(OSError, match=r"must have 0.000 GB free, .*the last checkpoint is .*step-00000001") as caught:
        saved.save(2, tensors(2), {})
    assert caught.value.errno == 28
    assert saved.latest() == tmp_path / "step-00000001"


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
sys.argv[0] = "yaongi.train"
runpy.run_module("yaongi.train", run_name="__main__")
"""


def test_a_write_that_fails(tokens: Path, tmp_path: Path) -> None:
    """Limit the file size, as on a full disk: one line, exit code 1, and the earlier checkpoint stays."""
    out = tmp_path / "run"
    more = ("--sample-tokens", "0", "--checkpoint-every", "3")
    assert run(tokens, out, "--stop-after", "3", *more).returncode == 0
    program = [sys.executable, "-c", LIMITED, *arguments(tokens, out, *more)]
    failed = subprocess.run(program, capture_output=True, text=True, env=environment(), timeout=300)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: checkpoint: step 6 could not be saved: ")
    assert failed.stderr.count("\n") == 1
    assert f"the last checkpoint is {out}/checkpoints/step-00000003" in failed.stderr
    assert [p.name for p in (out / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert run(tokens, out, *more).returncode == 0


SHORT = ("--tokens", "2048", "--checkpoint-every", "1", "--keep-last", "3", "--sample-tokens", "0")  # four steps


@pytest.fixture(scope="module")
def short(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of four steps, with the checkpoints of the last three."""
    out = tmp_path_factory.mktemp("short") / "run"
    done = run(tokens, out, *SHORT)
    assert done.returncode == 0, done.stderr
    return out


def flip(file: Path, place: int) -> None:
    """Flip a bit."""
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 16
    file.write_bytes(content)


def test_flipped_bits_are_noticed(tmp_path: Path) -> None:
    """Anywhere in any file of a checkpoint, and a file that is gone."""
    saved = checkpoints(tmp_path)
    saved.save(1, tensors(1), {"step": 1})
    path = saved.wait()
    assert path is not None
    assert sorted(file.name for file in path.iterdir()) == [".metadata", "SHA256SUMS", "__0_0.distcp", "run.json"]
    checked = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True)
    assert checked.stdout.count(": OK\n") == 3, checked
    rng = random.Random(0)
    for file in path.iterdir():
        for _ in range(10):
            place = rng.randrange(file.stat().st_size)
            flip(file, place)
            with pytest.raises(DamagedError, match="is damaged: "):
                saved.load(path, tensors(0))
            flip(file, place)
    saved.load(path, tensors(0))
    (path / "__0_0.distcp").unlink()
    with pytest.raises(DamagedError, match=r"__0_0\.distcp is missing$"):
        saved.load(path, tensors(0))


def spoil_tensors(folder: Path) -> None:
    """Flip a bit of the newest checkpoint's tensors."""
    flip(folder / "step-00000004" / "__0_0.distcp", 12345)


def cut_tensors(folder: Path) -> None:
    """Keep the first 100 bytes of the newest checkpoint's tensors."""
    file = folder / "step-00000004" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:100])


def spoil_meta(folder: Path) -> None:
    """Flip a bit of the newest checkpoint's `run.json`."""
    flip(folder / "step-00000004" / "run.json", 77)


def spoil_two(folder: Path) -> None:
    """Flip a bit in each of the two newest checkpoints."""
    spoil_tensors(folder)
    flip(folder / "step-00000003" / ".metadata", 5)


def empty_latest(folder: Path) -> None:
    """Leave an empty file, as some file systems do after a power cut."""
    (folder / "latest").write_bytes(b"")


def wrong_latest(folder: Path) -> None:
    """Name a checkpoint that isn't there."""
    (folder / "latest").write_bytes(b"step-00000009")


@pytest.mark.parametrize(
    ("spoil", "message", "step"),
    [
        (spoil_tensors, CHANGED, 3),
        pytest.param(cut_tensors, CHANGED, 3, marks=LONG),
        pytest.param(spoil_meta, "step-00000004 is damaged: run.json has changed since it was saved", 3, marks=LONG),
        pytest.param(spoil_two, CHANGED, 2, marks=LONG),
        (empty_latest, "checkpoints/latest must name a checkpoint, got ''", 4),
        pytest.param(wrong_latest, "checkpoints/latest must name a checkpoint, got 'step-00000009'", 4, marks=LONG),
    ],
)
def test_a_damaged_checkpoint(
    tokens: Path, short: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str, step: int
) -> None:
    """One line names the command that goes on from the newest undamaged one; that command ends with the same bits."""
    out = tmp_path / "run"
    shutil.copytree(short, out)
    spoil(out / "checkpoints")
    failed = run(tokens, out, *SHORT)
    assert failed.returncode == 1
    error, _, advice = failed.stderr.partition("; go on from an older one with: ")
    assert error.startswith("error: checkpoint: ")
    assert error.endswith(message)
    assert advice.endswith(f" --from-step {step}\n")
    assert advice.count("\n") == 1
    python, option, *words = shlex.split(advice)
    assert (python, option) == (sys.executable, "-m")
    done = run_module(*words, env=environment())
    assert done.returncode == 0, done.stderr
    said = f"resumed from step {step}" if step < 4 else "has done all of its 4 steps"
    assert said in done.stdout
    assert losses(out) == losses(short)
    mine, theirs = final_tensors(out), final_tensors(short)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.long
def test_no_checkpoint_is_whole(tokens: Path, short: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(short, out)
    for file in (out / "checkpoints").glob("*/.metadata"):
        flip(file, 9)
    failed = run(tokens, out, *SHORT)
    assert failed.returncode == 1
    assert failed.stderr.endswith(".metadata has changed since it was saved; there is no older one that is whole\n")


def test_back_to_an_older_step(tokens: Path, short: Path, tmp_path: Path) -> None:
    """Later checkpoints stay until the next save, and a run stopped before it goes on from the chosen step."""
    out = tmp_path / "run"
    shutil.copytree(short, out)
    refused = run(tokens, out, *SHORT, "--from-step", "1")
    assert refused.returncode == 1
    kept = f"{out}/checkpoints (2, 3, 4)"
    assert refused.stderr == f"error: checkpoint: --from-step must be one of the steps kept in {kept}, got 1\n"
    assert losses(out) == losses(short)
    with session_of(tokens, out, *SHORT, "--from-step", "2") as session:
        assert session.step == 2
    assert sorted(session.checkpoints.kept()) == [2, 3, 4]
    with session_of(tokens, out, *SHORT) as session:
        assert session.step == 2
        session.train_step(next(session.batches()))
        session.save(wait=True)
        assert sorted(session.checkpoints.kept()) == [2, 3]
    assert run(tokens, out, *SHORT).returncode == 0
    assert losses(out) == losses(short)
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "from_step"] == [2]


def test_a_checkpoint_of_an_earlier_version(tokens: Path, short: Path, tmp_path: Path) -> None:
    """Without hashes: it is loaded, with a warning."""
    out = tmp_path / "run"
    shutil.copytree(short, out)
    (out / "checkpoints" / "step-00000004" / "SHA256SUMS").unlink()
    done = run(tokens, out, *SHORT)
    assert done.returncode == 0
    assert "step-00000004 has no hashes, an earlier version saved it: it is loaded unchecked" in done.stderr


def test_a_slow_disk_is_named(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that a save says so if it had to wait for the previous one, and is silent otherwise."""
    write = FileSystemWriter.write_data

    def write_slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return write(*arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_slowly)
    monkeypatch.setattr("yaongi.train.session.PATIENCE", 0.25)
    with session_of(tokens, tmp_path / "run") as session:
        session.save()
        assert "waited" not in capsys.readouterr().out
        session.save()
        assert "s for the checkpoint before to be written" in capsys.readouterr().out
        session.checkpoints.wait()
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    first, second = (r for r in records if r["event"] == "checkpoint")
    assert first["waited"] < 0.25 < second["waited"] <= second["seconds"]
