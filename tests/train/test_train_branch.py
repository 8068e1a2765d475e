"""Runs that go on in another way: branched off a checkpoint, from a model, with other settings, past bad batches."""

import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from processes import train as in_process
from safetensors.torch import load_file
from small_run import FOR_KERNELS, arguments, final_tensors, losses, run, session_of, train_here

from yaongi.presets import continuations
from yaongi.train.__main__ import main
from yaongi.train.command_line import parse
from yaongi.train.report.page import write_report
from yaongi.train.step.stepper import Stepper

QUIET = ("--sample-tokens", "0", "--evaluate-every", "100")


def train(tokens: Path, out: Path, *more: str) -> int:
    """Train in this process, and return the exit code."""
    return train_here([*arguments(tokens, out), *QUIET, *more])


def events(out: Path) -> list[dict[str, Any]]:
    """Return all records of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stable(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of twelve steps, the last six of which decay; its checkpoints are 6, 9 and 12."""
    out = tmp_path_factory.mktemp("stable") / "run"
    assert train(tokens, out, "--decay", "0.5", "--keep-last", "3") == 0
    return out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_decay_branched_off_is_the_straight_run(device: str, tokens: Path, tmp_path: Path) -> None:
    """The same losses and the same bits at the end: weights, masters, momenta, data and balance go over."""
    common = (*FOR_KERNELS, "--device", device, "--warmup", "0", "--checkpoint-every", "3", "--evaluate-every", "100")
    train(tokens, tmp_path / "straight", *common, "--decay", "0.5")
    branch = ("--init", str(tmp_path / "straight"), "--init-step", "3", "--tokens", "12288", "--decay", "1")
    train(tokens, tmp_path / "branch", *common, *branch)
    assert [values for _, *values in losses(tmp_path / "branch")] == [
        values for _, *values in losses(tmp_path / "straight")[3:]
    ]
    straight, branched = (final_tensors(tmp_path / name) for name in ("straight", "branch"))
    assert straight.keys() == branched.keys()
    assert [name for name, tensor in straight.items() if not torch.equal(tensor, branched[name])] == []


@pytest.mark.long
@pytest.mark.parametrize("before", [1, 2])
def test_a_branch_on_two_processes(before: int, tokens: Path, tmp_path: Path) -> None:
    """Off two processes the same bits as their straight run's; off one, whose sums have another order, nearly."""
    decay = ("--warmup", "0", "--checkpoint-every", "6", "--dtype", "float64", *QUIET)

    def two(out: Path, *more: str) -> None:
        done = in_processes(2, tmp_path / "log", in_process, [*arguments(tokens, out), *decay, *more])
        assert not any(done.codes), "\n".join(done.err)[-4000:]

    straight, branch = tmp_path / "straight", tmp_path / "branch"
    if before == 1:
        assert train(tokens, straight, *decay, "--decay", "0.5") == 0
    else:
        two(straight, "--decay", "0.5")
    two(branch, "--init", str(straight), "--init-step", "6", "--tokens", "3072", "--decay", "1")
    wanted, found = (torch.tensor([values for _, *values in losses(out)[-6:]]) for out in (straight, branch))
    ends = [final_tensors(out) for out in (straight, branch)]
    assert ends[0].keys() == ends[1].keys()
    if before == 2:
        assert torch.equal(found, wanted)
        assert [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])] == []
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_the_lineage(tokens: Path, stable: Path, tmp_path: Path) -> None:
    """It stands in configuration, checkpoints, metrics and report, also of a branch's branch and after a resume."""
    first, second = tmp_path / "first", tmp_path / "second"
    branch = ("--init", str(stable), "--init-step", "6", "--tokens", "3072", "--warmup", "0")
    train(tokens, first, *branch, "--stop-after", "3")
    train(tokens, first, *branch)  # resumes, and starts from nothing again
    train(tokens, second, "--init", str(first), "--tokens", "1024", "--warmup", "0")
    assert [step for step, *_ in losses(first)] == list(range(1, 7))
    found = json.loads((second / "config.json").read_text())["lineage"]
    assert found == [
        {"folder": str(stable / "checkpoints" / "step-00000006"), "at": 6, "steps": 6, "tokens": 3072},
        {"folder": str(first / "checkpoints" / "step-00000006"), "at": 6, "steps": 12, "tokens": 6144},
    ]
    saved = json.loads((second / "checkpoints" / "step-00000002" / "run.json").read_text())
    assert saved["config"]["lineage"] == found
    assert [r["steps"] for r in events(second) if r["event"] == "init"] == [12]
    assert "step-00000006, 12 steps, 6.1k tokens" in (second / "report.html").read_text()


def test_a_continuation_takes_model_and_settings_from_where_it_starts(
    tokens: Path, stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The preset's few settings count before those of the run; the same bits as with all of them given."""
    branch = ("--init", str(stable), "--init-step", "6", "--tokens", "1536")
    train(tokens, tmp_path / "told", *branch, "--warmup", "0", "--decay", "1")
    short = ["--data", str(tokens), "--out", str(tmp_path / "run"), "--wandb", "off", "--no-tensorboard", *QUIET]
    assert train_here(["--preset", "continue/anneal", *branch, *short]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "told")
    for name in continuations():
        config = parse(["--preset", name, "--init", str(stable)])
        assert (config.preset, config.model.pattern) == (Path(name).name, "ME*M*")
        assert config.train.batch_tokens == max(512, config.train.row_tokens)
    with pytest.raises(ValueError, match=r"anneal\.toml must have a \[model\] table with a pattern, or go with --init"):
        parse(["--preset", "continue/anneal"])


def test_from_a_model_with_longer_rows(
    tokens: Path, stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights alone, and the data from its beginning; the first evaluation is that of the model."""
    out = tmp_path / "run"
    longer = ("--model.max-sequence-length", "128", "--row-tokens", "128", "--mix", "ko=1")
    session = session_of(tokens, out, *QUIET, *longer, "--init", str(stable / "model"))
    weights = load_file(next((stable / "model").glob("*.safetensors")))
    assert torch.equal(session.model.lm_head.weight, weights["lm_head.weight"])
    assert not any(t.any() for s in session.optimizer.tensors().values() for n, t in s.items() if n == "momentum")
    assert (session.step, session.loader.samples) == (0, 0)
    session.__exit__(None, None, None)
    session = session_of(tokens, tmp_path / "other", *QUIET, *longer, "--init", str(stable))
    assert any(t.any() for s in session.optimizer.tensors().values() for n, t in s.items() if n == "momentum")
    assert session.loader.samples == 0
    session.__exit__(None, None, None)
    assert (
        "the data is read from its beginning: loader: the saved position is of other data (" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--init", "{run}", "--init-step", "7"),
            r"--init-step must be one of the steps kept in .* \(6, 9, 12\), got 7",
        ),
        (("--init", "{run}/none"), "--init must be a model folder, a run or a checkpoint, got .*/none"),
        (("--init", "{out}"), "--init must be outside the folder of the new run, got "),
        (("--init-step", "7"), "train: --init-step must go with --init, got 7 alone"),
        (
            ("--init", "{run}", "--model.expert-size", "8"),
            r"of the same model, got another \(expert_size: 16 there, 8 here",
        ),
        (
            ("--init", "{run}/model", "--model.max-sequence-length", "32", "--row-tokens", "32"),
            "--model.max-sequence-length must be 64 or more, that of --init; --row-tokens may be less, got 32",
        ),
        (
            ("--init", "{run}", "--matrix-optimizer", "adamw"),
            "--matrix-optimizer must be teon, that of --init, got adamw",
        ),
        (
            ("--init", "{run}", "--engram-compression", "korean"),
            "must be of the same --engram-compression and tokenizer",
        ),
        (("--skip-batches", "2"), "--skip-batches must go with a run to go on with, got none in "),
    ],
)
def test_what_can_t_be_started_from(
    tokens: Path, stable: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(tokens, out, *(word.format(run=stable, out=out) for word in more))
    assert not (out / "metrics.jsonl").exists()


def test_settings_that_may_change(tokens: Path, stable: Path, tmp_path: Path) -> None:
    """Rates, clipping, evaluation and logging: recorded, told, marked in the report; the rest is refused."""
    out = tmp_path / "run"
    shutil.copytree(stable, out)
    other = ("--clip", "0.5", "--matrix-lr", "0.01", "--bad-steps", "9", "--log-every", "2")
    straight = ("--decay", "0.5", "--keep-last", "3")
    train(tokens, out, *straight, *other, "--from-step", "9")
    changed = [r for r in events(out) if r["event"] == "changed"]
    assert [r["step"] for r in changed] == [9]
    assert changed[0]["fields"] == {
        "train.bad_steps": [3, 9], "train.clip": [1.0, 0.5], "train.matrix_lr": [0.02, 0.01], "run.log_every": [4, 2],
    }  # fmt: skip
    assert [r["lr"] for r in events(out) if r["event"] == "step"][9] < 0.006
    page = write_report([out]).read_text()
    assert (
        "<th>step 9, changed</th><td>train.bad_steps 3 → 9, train.clip 1.0 → 0.5, train.matrix_lr 0.02 → 0.01" in page
    )
    assert "<th>step 9, gone back to this checkpoint</th>" in page
    refused = run(tokens, out, *QUIET, *straight, "--weight-decay", "0.2")
    advice = f"the run's own options go on with it, --init {out} with another --out starts one from its weights"
    assert refused.stderr.endswith(f"(train.weight_decay: the run has 0.1, got 0.2); {advice}\n")
    refused = run(tokens, out, *QUIET, *straight, "--model.expert-size", "8")
    assert refused.stderr.endswith("the run's own options go on with it, another --out starts a new one\n")


def test_past_bad_batches(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stops on bad batches names the command that goes on without them; it is recorded."""
    out, honest = tmp_path / "run", Stepper.__call__

    def spoilt(self: Stepper, batches: Any, *rest: Any) -> Any:
        result = honest(self, batches, *rest)
        return replace(result, bad="the loss") if 32 <= int(batches[0].samples[0]) < 40 else result

    monkeypatch.setattr(Stepper, "__call__", spoilt)
    with pytest.raises(
        ValueError, match=r"step 5: the loss is not finite; batch: samples 32-39.* go on from step 3 wi"
    ) as e:
        train(tokens, out, "--bad-steps", "0")
    words = shlex.split(str(e.value).split("without these batches: ")[1])
    assert words[-2:] == ["--skip-batches", "2"]
    monkeypatch.setattr(sys, "argv", ["train", *words[3:]])
    main()
    assert [r for r in events(out) if r["event"] == "skip_batches"] == [
        {"event": "skip_batches", "step": 3, "batches": 2, "samples": [24, 39]}
    ]
    assert [step for step, *_ in losses(out)] == list(range(1, 13))
    saved = json.loads((out / "checkpoints" / "step-00000012" / "run.json").read_text())
    assert saved["data"]["samples"] == (12 + 2) * 8


def test_a_restart_by_torchrun_does_nothing_twice(
    tokens: Path, stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun repeats the command line: what acts once has acted if a checkpoint was saved after it."""
    out = tmp_path / "run"
    shutil.copytree(stable, out)
    straight = ("--decay", "0.5", "--keep-last", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    for once in (("--from-step", "6", "--skip-batches", "1"), ("--fresh",)):
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
        train(tokens, out, *QUIET, *straight, *once, "--stop-after", "10")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        train(tokens, out, *straight, *once, "--stop-after", "11")
        assert [step for step, *_ in losses(out)] == list(range(1, 12))
        saved = json.loads((out / "checkpoints" / "step-00000011" / "run.json").read_text())
        assert saved["data"]["samples"] == (12 if "--skip-batches" in once else 11) * 8


def test_from_a_damaged_checkpoint(tokens: Path, stable: Path, tmp_path: Path) -> None:
    """One line that doesn't name a checkpoint of the new run."""
    shutil.copytree(stable, tmp_path / "origin")
    file = tmp_path / "origin" / "checkpoints" / "step-00000009" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"step-00000009 is damaged: .*; --init-step names another checkpoint$"):
        train(tokens, tmp_path / "run", "--init", str(tmp_path / "origin"), "--init-step", "9")
