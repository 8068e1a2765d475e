"""How often a run reads each source, and what `inspect` says about it."""

from pathlib import Path

import numpy as np
import pytest
from test_commands import run

from yaongi.data.epochs import Epochs, check_epochs, count_epochs, epoch_warnings, tokens_for
from yaongi.data.shards import ShardSet

THERE = {"ko": 1_000_000, "law/a": 50_000}
SHARES = {"ko": 3, "law/a": 1}


def test_epochs_are_tokens_wanted_by_tokens_there() -> None:
    ko, law = count_epochs(THERE, SHARES, 400_000)
    assert (ko.number, law.number) == (0.3, 2)
    assert str(law) == "law/a: 50,000 tokens there, 100,000 wanted, 2.00 epochs"
    assert tokens_for(THERE, SHARES, 4) == 800_000, "as many as the scarcest source allows"


def test_four_is_enough_and_sixteen_too_many() -> None:
    enough, much, too_much = (Epochs("ko", 100, wanted) for wanted in (400, 1600, 1601))
    assert epoch_warnings([enough]) == []
    assert epoch_warnings([enough, much]) == ["ko is read 16.0 times: above 4 epochs little more is learnt"]
    check_epochs([enough, much], allowed=False)
    check_epochs([too_much], allowed=True)
    with pytest.raises(ValueError, match=r"at most 16, or allowed by --allow-epochs, got ko: 100 tokens there, 1,601"):
        check_epochs([enough, too_much], allowed=False)


def test_inspect_shows_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shards: Path) -> None:
    run(monkeypatch, "inspect", str(shards))
    shown = capsys.readouterr().out
    assert "at the mix ko=40,en=20,code=25,math=15:" in shown
    assert "4.00 epochs" in shown
    assert "warning" not in shown
    with pytest.raises(SystemExit):
        run(monkeypatch, "inspect", str(shards), "--tokens", "15e9", "--mix", "ko=1")
    said = capsys.readouterr()
    assert "15,000,000,000 wanted" in said.out
    assert said.err.startswith("error: epochs: must be at most 16")
    run(monkeypatch, "inspect", str(shards), "--tokens", "15e9", "--mix", "ko=1", "--allow-epochs")
    assert "warning: ko is read " in capsys.readouterr().out


def test_inspect_shows_how_long_documents_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shards: Path
) -> None:
    """In parts of the tokens, and a warning where rows would be longer than almost every document."""
    shard_set = ShardSet.open(shards)
    ends = [shard_set.index(shard)[:, 0].astype(int) for shard in shard_set.shards("train", "code")]
    lengths = np.concatenate([np.diff(part, prepend=0) for part in ends])
    share = 100 * lengths[lengths >= 4096].sum() / lengths.sum()
    run(monkeypatch, "inspect", str(shards), "--row-tokens", "32768")
    shown = capsys.readouterr().out
    assert f"code: tokens in documents {share:.0f}% of 4k and more, " in shown
    assert "warning: 0% of the tokens of ko are in documents of 32,768 tokens and more" in shown
    run(monkeypatch, "inspect", str(shards), "--row-tokens", "4")
    assert "hardly teach a long context" not in capsys.readouterr().out
