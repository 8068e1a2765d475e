"""Preferences: the loss and its gradient, the reference, and a model that comes to prefer what was chosen."""

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_chats import arguments, write_preferences
from small_run import ALONE, final_tensors, losses

from yaongi.data.chats.rows import PreferenceRows
from yaongi.data.tokenizer import Tokenizer
from yaongi.files import read_json_lines
from yaongi.model import Yaongi
from yaongi.model.losses import NO_TARGET
from yaongi.tune.__main__ import main
from yaongi.tune.dpo import PreferenceLoss, preference_losses
from yaongi.tune.preferences import PairBatch, PairLoader, PairRows, reference_scores

FEW = ("--objective", "dpo", "--evaluate-every", "1000", "--checkpoint-every", "0", "--sample-tokens", "0")


@pytest.fixture(scope="module")
def written(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preferences(tmp_path_factory.mktemp("prefs") / "written", tokenizer)


@pytest.fixture
def pairs(written: Path, tmp_path: Path) -> Path:
    """Return a copy, in which the reference's scores will be kept."""
    return Path(shutil.copytree(written, tmp_path / "pairs"))


def tune(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["yaongi.tune", *given])
    main()


def batch_of(pairs: Path, model: Path, tokenizer: Tokenizer) -> PairBatch:
    loader = PairLoader(pairs, tokenizer, row_tokens=64, batch_rows=4, seed=0)
    loader.reference = reference_scores(model, loader.preferences, ALONE, torch.float64, lambda _: None)
    return loader.read(range(4))


def test_rows_hold_whole_pairs_and_all_of_them(written: Path) -> None:
    preferences = PreferenceRows(written, "train")
    rows = PairRows(preferences, 64)
    assert sorted(number for row in rows.members for number in row.tolist()) == list(range(60))
    for row, members in enumerate(rows.members):
        ids, documents, targets = rows.read(row)
        for place, number in enumerate(members.tolist()):
            for side, answer in enumerate(preferences.pair(number)):
                here = documents == 2 * place + side
                assert ids[here].tolist() == answer.ids.tolist()
                assert (targets[here] >= 0).sum() == answer.mask[1:].sum()
        assert (targets[documents == 2 * len(members)] == NO_TARGET).all()
    with pytest.raises(ValueError, match=r"--row-tokens must be \d+ or more, as long as a pair, got 8"):
        PairRows(preferences, 8)


@pytest.mark.parametrize("length_normalised", [False, True])
def test_the_loss_and_its_gradient_are_those_of_plain_torch(
    length_normalised: bool, model: Path, pairs: Path, tokenizer: Tokenizer
) -> None:
    """In float64, with a reference that differs from the model; the mean is over the pairs that are there."""
    batch = batch_of(pairs, model, tokenizer)
    assert batch.pairs is not None
    assert batch.reference is not None
    assert batch.targets is not None
    batch = replace(batch, reference=batch.reference + torch.randn(batch.reference.shape, dtype=torch.float64))
    policy = Yaongi.from_pretrained(model, dtype=torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0
    logits = policy(batch.input_ids, batch.document_ids).log_softmax(-1)
    for row in range(4):
        for pair in range(int(batch.pairs[row])):
            gains = []
            for side in (0, 1):
                here = (batch.document_ids[row] == 2 * pair + side) & (batch.targets[row] >= 0)
                found = logits[row, here].gather(1, batch.targets[row, here, None])
                gain = found.sum() - batch.reference[row, pair, side]
                gains.append(gain / here.sum() if length_normalised else gain)
            total = total - torch.nn.functional.logsigmoid(0.3 * (gains[0] - gains[1]))
            count += 1
    parameters = dict(policy.named_parameters())
    wanted = torch.autograd.grad(total / count, parameters.values(), allow_unused=True)
    objective = PreferenceLoss(0.3, length_normalised=length_normalised)
    parts = objective.parts(batch)
    pairs_there, _ = objective.count(parts, torch.zeros(0))
    assert int(pairs_there) == count
    loss = objective(policy, parts, 1 / pairs_there.double()).loss
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-12)
    found = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
    for name, got, exact in zip(parameters, found, wanted, strict=True):
        if exact is None:
            assert got is None or not got.any(), name
        else:
            torch.testing.assert_close(got.to_dense(), exact.to_dense(), rtol=1e-9, atol=1e-12)


def test_the_first_loss_is_ln_2_and_the_order_of_pairs_doesn_t_matter(
    model: Path, pairs: Path, tokenizer: Tokenizer
) -> None:
    batch, policy = batch_of(pairs, model, tokenizer), Yaongi.from_pretrained(model)
    objective = PreferenceLoss(0.1, length_normalised=False)

    def losses_of(rows: list[int]) -> float:
        parts = [part[rows] for part in objective.parts(batch)]
        count, _ = objective.count(parts, torch.zeros(0))
        return objective(policy, parts, 1 / count).loss.item()

    assert losses_of([0, 1, 2, 3]) == pytest.approx(math.log(2), abs=1e-6)
    assert losses_of([3, 1, 0, 2]) == pytest.approx(losses_of([0, 1, 2, 3]), rel=1e-6)
    one, other = torch.tensor([[-3.0, -5.0]]), torch.tensor([[-4.0, -4.5]])
    (loss, margin), (swapped, back) = (
        preference_losses(a, b, torch.ones(1, 2), 0.1, False) for a, b in ((one, other), (one.flip(1), other.flip(1)))
    )
    assert margin.item() == pytest.approx(0.1 * (2 - 0.5))
    assert back.item() == pytest.approx(-margin.item())
    assert (swapped - loss).item() == pytest.approx(margin.item())


def test_what_was_chosen_is_preferred(
    model: Path,
    pairs: Path,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The reference is computed once, the first loss is ln 2, and held-out pairs are told apart at the end."""
    out, more = tmp_path / "out", ["--epochs", "6", "--lr-scale", "0.3", "--base-data", str(tokens), *FEW]
    tune(arguments(model, pairs, out, *more), monkeypatch)
    said = capsys.readouterr().out
    assert said.count("are computed once") == 2, "of the training pairs and of those held out"
    assert len(list(pairs.glob("reference-*.json"))) == 2
    records = read_json_lines(out / "metrics.jsonl")
    steps = [record for record in records if record["event"] == "step"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    first, *_, last = [record for record in records if record["event"] == "preferences"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert last["accuracy"] >= 0.9 > 0.8 >= first["likelier"]
    assert {"chosen", "rejected", "accuracy", "margin"} <= steps[-1].keys()
    assert "accuracy" in said.split("step 1/")[1].splitlines()[0]
    bits = [record["bpb"] for record in records if record["event"] == "evaluation"]
    assert list(bits[0]) == ["ko", "en", "code", "math"]
    assert [record["event"] for record in records].count("answers") == 2
    tune(arguments(model, pairs, tmp_path / "again", *more), monkeypatch)
    assert "are computed once" not in capsys.readouterr().out


def test_two_pieces_are_one(model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--epochs", "2", "--stop-prompts", "0", *FEW]
    tune(arguments(model, pairs, tmp_path / "whole", *more), monkeypatch)
    tune(arguments(model, pairs, tmp_path / "pieces", *more, "--stop-after", "3"), monkeypatch)
    tune(arguments(model, pairs, tmp_path / "pieces", *more), monkeypatch)
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    whole, pieces = (final_tensors(tmp_path / name) for name in ("whole", "pieces"))
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--objective", "sft", "--beta", "1"], "--beta and --length-normalised must go with --objective dpo, got sft"),
        (["--objective", "dpo", "--mix", "chat=1"], "--mix must be left out with --objective dpo, got chat=1"),
    ],
)
def test_mistakes(
    more: list[str],
    message: str,
    model: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        tune(arguments(model, pairs, tmp_path / "out", *more), monkeypatch)
    assert message in capsys.readouterr().err
