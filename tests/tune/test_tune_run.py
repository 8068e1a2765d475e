"""Tuning is the trainer's run: logs, resume, processes; and the folder that it leaves chats."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from small_chats import LETTERS, arguments
from small_run import final_tensors, losses

from yaongi.data.chats.encode import encode_prompt
from yaongi.data.pieces import END_OF_TURN
from yaongi.data.tokenizer import Tokenizer
from yaongi.export import Export
from yaongi.files import read_json_lines
from yaongi.model import Yaongi
from yaongi.model.generation import generate
from yaongi.train.report.curves import Curves
from yaongi.train.report.run import Run
from yaongi.tune.__main__ import main

FEW = ("--micro-rows", "1", "--evaluate-every", "1000", "--checkpoint-every", "0", "--sample-tokens", "0")


def tune(given: Sequence[str]) -> None:
    """Run `python -m yaongi.tune`."""
    sys.argv[1:] = given
    main()


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["yaongi.tune"])


def events(out: Path, event: str) -> list[dict[str, Any]]:
    return [record for record in read_json_lines(out / "metrics.jsonl") if record["event"] == event]


def test_a_tuning_from_start_to_end(
    model: Path, chats: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    tune(arguments(model, chats, out, "--mix", "chat=0.75,ko=0.25", "--base-data", str(tokens), "--log-every", "1"))
    said = capsys.readouterr()
    config = json.loads((out / "config.json").read_text())
    assert config["tune"].items() >= {"objective": "sft", "epochs": 2.0, "lr_scale": 0.1}.items()
    assert (config["train"]["matrix_lr"], config["train"]["adam_lr"]) == pytest.approx((2e-3, 3e-4))
    assert config["lineage"][0]["folder"] == str(model.resolve())
    steps = events(out, "step")
    chat_rows = round(len(steps) * 4 * 0.75)
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    assert f"{chat_rows * 64:,} wanted" in said.out
    assert all(0 < record["target_share"] < 0.9 for record in steps)
    assert f"targets {100 * steps[0]['target_share']:.0f}%" in said.out
    assert steps[-1]["lr"] == 0
    evaluations, answers = events(out, "evaluation"), events(out, "answers")
    assert list(evaluations[0]["bpb"]) == ["chat", "ko", "en", "code", "math"], "what is forgotten, whatever the mix"
    assert [record["step"] for record in answers] == [record["step"] for record in evaluations]
    assert answers[-1]["loss"] < answers[0]["loss"]
    assert {"stop_rate", "length"} <= answers[0].keys()
    assert list(events(out, "samples")[0]["texts"]) == ["Korean", "code", "math"]
    titles = [panel.title for panel in Curves([Run(out, read_json_lines(out / "metrics.jsonl"))], "ko").panels()]
    assert {"스스로 끝난 답변, %", "답변의 길이, 토큰"} <= set(titles)
    assert (out / "report.html").is_file()


def test_the_folder_says_where_answers_end_and_the_router_is_as_before(
    model: Path, chats: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    tune(arguments(model, chats, out))
    before, tuned = Yaongi.from_pretrained(model), Yaongi.from_pretrained(out / "model")
    end = tokenizer.piece_to_id(END_OF_TURN)
    assert tuned.config.answer_ends == [tokenizer.eos_id, end]
    assert json.loads((out / "model" / "tokenizer_config.json").read_text())["eos_token"] == END_OF_TURN
    assert Tokenizer.of_model(out / "model").hash == tokenizer.hash
    for (name, old), new in zip(before.state_dict().items(), tuned.state_dict().values(), strict=True):
        frozen = name.endswith("e_score_correction_bias") or name == "backbone.compression"
        assert torch.equal(old, new) == frozen, name
    Export(max((out / "checkpoints").glob("step-*")), out=tmp_path / "hub", drop_engram=True).run()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hub" / name).read_bytes() == (out / "model" / name).read_bytes(), "of a checkpoint too"


def test_two_pieces_are_one(
    model: Path, chats: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bits at the end; another number of epochs is another run."""
    more = ("--mix", "chat=0.5,en=0.5", "--base-data", str(tokens), "--epochs", "0.5")
    tune(arguments(model, chats, tmp_path / "whole", *more))
    tune(arguments(model, chats, tmp_path / "pieces", *more, "--stop-after", "3"))
    assert [step for step, *_ in losses(tmp_path / "pieces")] == [1, 2, 3]
    with pytest.raises(SystemExit):
        tune(arguments(model, chats, tmp_path / "pieces", *more, "--epochs", "3"))
    assert "tune.epochs: the run has 0.5, got 3.0" in capsys.readouterr().err
    tune(arguments(model, chats, tmp_path / "pieces", *more))
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    whole, pieces = (final_tensors(tmp_path / name) for name in ("whole", "pieces"))
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in whole.items())
    answers, again = (events(tmp_path / name, "answers") for name in ("whole", "pieces"))
    assert answers == again


@pytest.mark.long
def test_two_processes_are_one(model: Path, chats: Path, tokens: Path, tmp_path: Path) -> None:
    more = ["--mix", "chat=0.5,en=0.5", "--base-data", str(tokens), "--dtype", "float64", "--epochs", "0.5", *FEW]
    tune(arguments(model, chats, tmp_path / "1", *more))
    done = in_processes(2, tmp_path / "log", tune, arguments(model, chats, tmp_path / "2", *more))
    assert not any(done.codes), "\n".join(done.err)[-4000:]
    for (_, loss, gnorm), (_, alone, norm) in zip(losses(tmp_path / "2"), losses(tmp_path / "1"), strict=True):
        assert (loss, gnorm) == pytest.approx((alone, norm), rel=1e-9)
    for two, one in zip(events(tmp_path / "2", "answers"), events(tmp_path / "1", "answers"), strict=True):
        assert (two["step"], two["stop_rate"], two["length"]) == (one["step"], one["stop_rate"], one["length"])
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)


def test_answers_are_learnt_and_end(model: Path, chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """40 steps: every answer to a prompt that was seen ends by itself, most of them right; none ends by EOS."""
    out = tmp_path / "tuned"
    tune(arguments(model, chats, out, "--lr-scale", "2", "--epochs", "4", *FEW))
    assert events(out, "answers")[-1]["stop_rate"] == 1
    tuned = Yaongi.from_pretrained(out / "model")
    prompts = [encode_prompt([{"role": "user", "content": letter}], tokenizer) for letter in LETTERS]
    answers = generate(tuned, prompts, max_new_tokens=8)
    assert all(len(answer) < 8 for answer in answers)
    assert sum(tokenizer.decode(a) == letter for a, letter in zip(answers, LETTERS, strict=True)) >= 6
    assert all(len(a) == 8 for a in generate(tuned, prompts, max_new_tokens=8, stop=[tokenizer.eos_id]))


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ((), "the tuning was too short or its steps too small"),
        (("--answer-tokens", "1"), "3 of the held-out answers are not shorter than --answer-tokens 1"),
    ],
)
def test_answers_that_don_t_end_are_a_warning(
    more: tuple[str, ...], cause: str, model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(arguments(model, chats, tmp_path / "out", "--epochs", "0.1", "--lr-scale", "0.001", *FEW, *more))
    assert f"warning: only 0 of 3 answers ended by themselves: {cause}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mix", "chat=0.9,ko=0.1"), "--mix with ko must go with --base-data, got none"),
        (("--mix", "ko=1"), "--mix must have a share of chat, got ko=1"),
        (("--tokens", "1e6"), "--tokens must be left out: --epochs sets how long it is"),
        (("--parallel", "fsdp"), "--parallel must be replicate, got fsdp"),
        (
            ("--data", "none"),
            "--data must be a folder of conversations or preferences .* got none; python -m yaongi.da",
        ),
        (("--parallel", "auto"), "--parallel must be replicate, got auto"),
        (("--lr-scale", "0"), "lr_scale must be above 0, got 0.0"),
        (("--row-tokens", "4", "--batch-tokens", "8"), "row_tokens must be .* as long as the longest conversation"),
    ],
)
def test_mistakes(
    more: tuple[str, ...], message: str, model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tune(arguments(model, chats, tmp_path / "out", *more))
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_another_tokenizer(model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(SystemExit):
        tune(arguments(other, chats, tmp_path / "out"))
    assert "--init must be of --data's tokenizer" in capsys.readouterr().err
