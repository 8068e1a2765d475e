"""How often a run reads each source, and what `inspect` says about it."""

from pathlib import Path

import pytest
from test_commands import run

from yaongi.data.epochs import Epochs, check_epochs, count_epochs, epoch_warnings, tokens_for

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
    run(monkeypatch, "inspect", "--folder", str(shards))
    shown = capsys.readouterr().out
    assert "at the mix ko=40,en=20,code=25,math=15:" in shown
    assert "4.00 epochs" in shown
    assert "warning" not in shown
    with pytest.raises(SystemExit):
        run(monkeypatch, "inspect", "--folder", str(shards), "--tokens", "15e9", "--mix", "ko=1")
    said = capsys.readouterr()
    assert "15,000,000,000 wanted" in said.out
    assert said.err.startswith("error: epochs: must be at most 16")
    run(monkeypatch, "inspect", "--folder", str(shards), "--tokens", "15e9", "--mix", "ko=1", "--allow-epochs")
    assert "warning: ko is read " in capsys.readouterr().out
