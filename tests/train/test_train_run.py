"""A run from start to end: resumed, stopped, refused, and the files that it leaves."""

import fcntl
import hashlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import arguments, command, documents, environment, final_tensors, losses, run

from yaongi.data.loader import Loader
from yaongi.data.tokenizer import Tokenizer
from yaongi.kernels import moe_route
from yaongi.model import Yaongi
from yaongi.train import program
from yaongi.train.__main__ import main

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def whole(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run, with a secret in its environment and an unreachable wandb server."""
    out = tmp_path_factory.mktemp("whole") / "run"
    keys = {"WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run(tokens, out, "--wandb", "auto", "--tensorboard", **keys)
    assert done.returncode == 0, done.stderr
    (out / "stdout.txt").write_text(done.stdout + done.stderr)
    return out


def test_what_a_run_leaves(whole: Path) -> None:
    """Check metrics, TensorBoard, an offline wandb run, a self-contained report, and the printed lines."""
    assert [step for step, *_ in losses(whole)] == list(range(1, 13))
    assert losses(whole)[-1][1] < losses(whole)[0][1] - 0.5
    assert list((whole / "tensorboard").iterdir())
    assert list((whole / "wandb").glob("offline-run-*"))
    page = (whole / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"(src|href|url|@import)\W{0,3}(https?:)?//", page)  # nothing is loaded from elsewhere
    printed = (whole / "stdout.txt").read_text()
    assert "wandb: no connection, so this run is logged offline" in printed
    assert "step 12/12 | loss " in printed
    assert "held-out bits per byte ko " in printed


def test_no_secret_anywhere(whole: Path) -> None:
    """Check that the secret is not in a log, a configuration or a checkpoint."""
    for path in whole.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_the_model_folder(whole: Path) -> None:
    """Load it without the trainer, with its tokenizer, and compare with the last step's weights."""
    model = Yaongi.from_pretrained(whole / "model")
    assert Tokenizer.load(whole / "model").vocab_size == model.config.vocab_size
    saved = final_tensors(whole)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[f"model/{name}"]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_saves(tokens: Path, tmp_path: Path, whole: Path, number: int) -> None:
    """Resume with the command that it prints; the end equals that of the uninterrupted run, bit for bit."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(tokens, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(number)
            break
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f"go on with: {sys.executable} -m yaongi.train --config" in printed
    assert "Traceback" not in errors
    step = int(printed.split("saved step ")[1].split(";")[0])
    assert json.loads((out / "checkpoints" / f"step-{step:08d}" / "run.json").read_text())["step"] == step
    done = run(tokens, out)
    assert f"resumed from step {step}" in done.stdout
    assert losses(out) == losses(whole)
    assert_same_tensors(out, whole)


def assert_same_tensors(out: Path, whole: Path) -> None:
    """Check that two runs ended with the same checkpoint, bit for bit."""
    mine, theirs = final_tensors(out), final_tensors(whole)
    assert mine.keys() == theirs.keys()
    assert [name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])] == []


def test_a_finished_run_is_left_alone(tokens: Path, whole: Path) -> None:
    """Run the same command again: it trains nothing and succeeds."""
    before = (whole / "metrics.jsonl").read_text()
    assert run(tokens, whole).returncode == 0
    assert (whole / "metrics.jsonl").read_text() == before


def test_another_configuration(tokens: Path, whole: Path, tmp_path: Path) -> None:
    """Refuse it and name the differences; `--fresh` starts from scratch."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    refused = run(tokens, out, "--momentum", "0.9")
    assert refused.returncode == 1
    assert "train.momentum: the run has 0.95, got 0.9" in refused.stderr
    assert "--fresh" not in refused.stderr
    assert losses(out) == losses(whole)
    fresh = run(tokens, out, "--momentum", "0.9", "--fresh", "--stop-after", "1")
    assert fresh.returncode == 0
    assert len(losses(out)) == 1


def test_dry_run(tokens: Path, tmp_path: Path) -> None:
    """Print the plan and write nothing."""
    done = run(tokens, tmp_path / "run", "--dry-run", "--dollars-per-hour", "3600")
    assert done.returncode == 0
    for text in ("parameters", "12 steps of 8 x 64", "fits", "about $"):
        assert text in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "allowed"), [("4.2", False), ("17", True)])
def test_many_epochs_are_a_warning(tokens: Path, tmp_path: Path, number: str, allowed: bool) -> None:
    """Above four, and above sixteen with leave."""
    wanted = ("--tokens", str(float(number) * Loader(tokens, row_tokens=64, batch_rows=8, mix="ko=1").tokens["ko"]))
    done = run(tokens, tmp_path / "run", "--dry-run", "--mix", "ko=1", *wanted, *["--allow-epochs"] * allowed)
    assert done.returncode == 0, done.stderr
    assert "mix          ko=1; not in it: en, code, math" in done.stdout
    assert re.search(r"^data +ko: [\d,]+ tokens there, [\d,]+ wanted, [\d.]+ epochs$", done.stdout, re.MULTILINE)
    assert re.search(r"warning: ko is read [\d.]+ times: above 4 epochs", done.stderr)


def test_very_many_epochs_are_an_error(tokens: Path, tmp_path: Path) -> None:
    """Before anything is written, in a dry run too; `--max-epochs` takes fewer tokens."""
    for dry in ((), ("--dry-run",)):
        done = run(tokens, tmp_path / "run", "--tokens", "15e9", *dry)
        assert done.returncode == 1
        assert "data         ko: " in done.stdout
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
        assert line.startswith("error: epochs: must be at most 16, or allowed by --allow-epochs, got ")
        assert not (tmp_path / "run").exists()
    done = run(tokens, tmp_path / "run", "--tokens", "15e9", "--max-epochs", "4", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "at most 4 epochs of what is there, not the 15,000,000,000 asked for" in done.stdout
    assert max(float(number) for number in re.findall(r"([\d.]+) epochs$", done.stdout, re.MULTILINE)) > 3.5


def test_two_runs_in_a_folder(tokens: Path, tmp_path: Path) -> None:
    """Refuse the second one."""
    out = tmp_path / "run"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = run(tokens, out)
    assert refused.returncode == 1
    assert "another process trains in" in refused.stderr
    assert refused.stdout == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--momentum", "0.9"), "train.momentum: the run has 0.95, got 0.9"),
        (("--from-step", "7"), "--from-step must be one of the steps kept in "),
    ],
)
def test_errors_come_before_the_plan(tokens: Path, whole: Path, more: tuple[str, ...], message: str) -> None:
    refused = run(tokens, whole, *more)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert refused.stdout == ""


def test_a_folder_that_is_none(tokens: Path, tmp_path: Path) -> None:
    """A file, and a folder below a file: one line before the plan."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        refused = run(tokens, tmp_path / "run", "--out", str(out))
        assert refused.returncode == 1
        wanted = f"error: train: --out must be a folder, got {out}: {tmp_path}/file is a file\n"
        assert (refused.stdout, refused.stderr) == ("", wanted)


def test_data_that_is_missing(tokens: Path, tmp_path: Path) -> None:
    """Name the command that makes exactly that folder, tokenizer and shards alike."""
    for folder in (tmp_path / "no where", tokens / "tokenizer"):
        refused = run(folder, tmp_path / "run")
        made = f"python -m yaongi.data tokenize --out {shlex.quote(str(folder))} makes one"
        rule = "--data must be a folder of token shards with their tokenizer"
        assert refused.stderr == f"error: train: {rule}, got {folder}; {made}\n"


def spoil_shard(folder: Path) -> None:
    """Flip one bit."""
    file = next((folder / "train").glob("*.bin"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def cut_shard(folder: Path) -> None:
    """Remove the last byte."""
    file = next((folder / "train").glob("*.bin"))
    file.write_bytes(file.read_bytes()[:-1])


def change_tokenizer(folder: Path) -> None:
    """Put in a tokenizer of another text."""
    from yaongi.data.tokenizer import train_tokenizer

    train_tokenizer(documents(9, 100), 520).save(folder / "tokenizer")


def put_an_id_out_of_range(folder: Path) -> None:
    """Put one into a shard, with the right hash in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for domain in manifest["splits"]["train"].values():
        for shard in domain["shards"]:
            content = b"\xff\xfe" * shard["tokens"]
            (folder / shard["file"]).write_bytes(content)
            shard["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def drop_domain(folder: Path) -> None:
    """Remove mathematics."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["splits"]["train"]["math"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_shard, "has changed since it was made"),
        (cut_shard, "is truncated or changed"),
        (change_tokenizer, "was made with tokenizer"),
        (put_an_id_out_of_range, "token ids must be below 600, got 65279"),
        (drop_domain, "domains must be among ko, en, code, which have text, got math"),
        (shutil.rmtree, "tokenizer"),
    ],
)
def test_data_that_is_wrong(tokens: Path, tmp_path: Path, spoil: object, message: str) -> None:
    """Check for one line, exit code 1 and no step."""
    folder = tmp_path / "tokens"
    shutil.copytree(tokens, folder)
    spoil(folder)  # type: ignore[operator]
    done = run(folder, tmp_path / "run", "--mix", "ko=40,en=20,code=25,math=15")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_other_data_than_the_run_s(tokens: Path, whole: Path, tmp_path: Path) -> None:
    """Refuse to resume: a position in one training order has no meaning in another."""
    folder = tmp_path / "tokens"
    shutil.copytree(tokens, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "note": "another"}))
    refused = run(folder, whole)
    assert refused.returncode == 1
    assert "the saved position is of other data" in refused.stderr


def test_an_operation_without_a_deterministic_form(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Name it and the option to add; the advice of torch's own message is no command-line option."""

    def refuse(*_: object) -> int:
        torch.zeros(4, 4).put_(torch.tensor([0]), torch.ones(1))
        return 0

    monkeypatch.setattr(program, "train", refuse)
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tokens, tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: put_ can't give the same bits every time here: add --no-deterministic\n"


@pytest.mark.parametrize(
    ("more", "advice"),
    [
        (("--micro-rows", "8"), "try --micro-rows 4"),
        (("--micro-rows", "1"), "try --micro-rows 1 --recompute mamba\n"),
        (("--micro-rows", "1", "--recompute", "mamba"), "try --micro-rows 1 --recompute all\n"),
        (("--micro-rows", "1", "--recompute", "all"), "try more GPUs (torchrun), shorter rows (--row-tokens) or a"),
    ],
)
def test_out_of_gpu_memory(
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    advice: str,
) -> None:
    """Name the part of the step and the setting to change, in one line."""

    def refuse(logits: torch.Tensor, *rest: Any) -> Any:
        if logits.is_meta:  # the plan's count on the meta device
            return moe_route(logits, *rest)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79")

    monkeypatch.setattr("yaongi.model.mixers.moe.moe_route", refuse)
    monkeypatch.setattr("yaongi.train.plan.passes._LARGEST", 0)  # the plan times no pass of its own
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tokens, tmp_path / "run", *more)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out of GPU memory in an expert layer, which needed 1.50 GiB: " + advice), error
