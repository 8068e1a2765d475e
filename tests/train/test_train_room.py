"""Room on the disk is checked before the first step; folders that are links or mount points stay such."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError
from small_run import arguments, final_tensors, run, train_here

from yaongi.data.stages.shard_folder import replace
from yaongi.data.stages.tokenize_sources import Options, tokenize_sources
from yaongi.data.tokenizer import Tokenizer
from yaongi.model.hub import weights
from yaongi.train.checkpoint.room import check_room, most_checkpoints
from yaongi.train.run_folder import remove_run

QUIET = ("--sample-tokens", "0", "--evaluate-every", "100")
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("there", "saves", "keep_last", "keep_every", "wanted"),
    [
        ((), (12,), 2, 0, (1, 1)),
        ((), (3, 6, 9, 12), 2, 0, (3, 2)),  # the third is written before the first goes
        ((), (3, 6, 9, 12), 1, 6, (3, 2)),
        ((), (3, 6, 9, 12), 4, 0, (4, 4)),
        ((3, 6), (9, 12), 2, 0, (3, 2)),
        ((3, 6, 9), (6, 9), 2, 0, (4, 2)),  # gone back to 3: 6 is replaced when the new one is whole
        ((12,), (), 2, 0, (1, 1)),
    ],
)
def test_how_many_checkpoints(
    there: tuple[int, ...], saves: tuple[int, ...], keep_last: int, keep_every: int, wanted: tuple[int, int]
) -> None:
    assert most_checkpoints(there, saves, keep_last, keep_every) == wanted


def test_room_for_all_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one disk the most of both moments; on two, each its own."""
    free = {tmp_path: 0.0}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, free[place]))
    folders = tmp_path / "checkpoints", tmp_path / "model"
    for wanted, counts in ((3.15e9, (0, 3, 2)), (2.625e9, (0, 2, 2)), (0.525e9, (2, 2, 2)), (1.05e9, (2, 3, 2))):
        free[tmp_path] = wanted - 1
        with pytest.raises(OSError, match=rf"must have {wanted / 1e9:.3f} GB free for all that the run keeps, got"):
            check_room(*folders, counts, (10**9, 5 * 10**8))
        free[tmp_path] = wanted
        check_room(*folders, counts, (10**9, 5 * 10**8))
    (tmp_path / "model").mkdir()
    free |= {tmp_path: 2.1e9, tmp_path / "model": 0.525e9}
    real = os.stat
    device = lambda p: 1 if str(p).endswith("model") else 0  # noqa: E731
    monkeypatch.setattr(os, "stat", lambda p, **o: namedtuple("S", "st_dev")(device(p)) if not o else real(p, **o))
    check_room(*folders, (0, 2, 2), (10**9, 5 * 10**8))


def test_a_disk_that_is_too_small(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line before the first step."""
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 1000))
    with pytest.raises(OSError, match=r"must have 0\.00\d GB free for all that the run keeps, got 0.000 GB \(3 checkp"):
        train_here(arguments(tokens, tmp_path / "run", *QUIET))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_disk_that_is_full_at_the_end(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model can't be written: one line; the same command writes it when there is room."""
    words = arguments(tokens, tmp_path / "run", *QUIET, "--tokens", "1024", "--checkpoint-every", "0")

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as context:
        context.setattr(weights, "save_file", full)
        message = (
            r"^\[Errno 5\] train: the model can't be written to .*/model: .*No space left on device.*; the last check"
        )
        with pytest.raises(OSError, match=message):
            train_here(words)
    assert not list((tmp_path / "run" / "model").iterdir())
    assert train_here(words) == 0
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.long
def test_links_stay_links(tokens: Path, tmp_path: Path) -> None:
    """A run whose folder and whose checkpoints lie elsewhere: also with --fresh."""
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "large").mkdir()
    out = tmp_path / "run"
    out.symlink_to(tmp_path / "disk" / "run")
    (out / "checkpoints").symlink_to(tmp_path / "large")
    more = (*QUIET, "--tokens", "1024")
    for fresh in ((), ("--fresh",)):
        done = run(tokens, out, *more, *fresh)
        assert done.returncode == 0, done.stderr
        assert out.is_symlink()
        assert (out / "checkpoints").is_symlink()
        assert [path.name for path in sorted((tmp_path / "large").iterdir())] == ["latest", "step-00000002"]
    assert final_tensors(tmp_path / "disk" / "run")


def test_tokens_may_lie_behind_a_link(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "large" / "tokens").mkdir(parents=True)
    out = tmp_path / "tokens"
    out.symlink_to(tmp_path / "large" / "tokens")
    for near in (False, True):  # the second time other shards take the place of the first
        options = Options(near_duplicates=near)
        tokenize_sources(
            [str(tokens.parent)], Tokenizer.load(tokens / "tokenizer"), out, options, workers=1, say=lambda _: None
        )
        assert out.is_symlink()
        assert [path.name for path in (tmp_path / "large").iterdir()] == ["tokens"]
        assert (tmp_path / "large" / "tokens" / "manifest.json").is_file()


def test_mount_points_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be removed or renamed, as mount points can't, is emptied, or filled."""
    mounted = {tmp_path / "run" / "checkpoints"}
    monkeypatch.setattr(Path, "is_mount", lambda path: path in mounted)
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").touch()
    (tmp_path / "run" / "model").mkdir()
    remove_run(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["checkpoints"]

    out, building = tmp_path / "tokens", tmp_path / "tokens" / ".building"
    for folder, content in ((out, "old"), (building, "new")):
        (folder / "train").mkdir(parents=True)
        for name in ("manifest.json", "train/ko.bin"):
            (folder / name).write_text(content)
    (out / "own.txt").touch()
    renamed: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: (renamed.append(path.name), rename(path, to))[1])
    replace(out, building)
    assert (out / "train" / "ko.bin").read_text() == (out / "manifest.json").read_text() == "new"
    assert renamed == ["train", "manifest.json"]
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "own.txt", "train"]
