"""`python -m yaongi.data`: the stages one after another, and errors that are one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from yaongi.data.__main__ import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["yaongi.data", *arguments])
    main()


def test_from_text_to_shards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: Path, tmp_path: Path
) -> None:
    source, out = ("--source", str(corpus)), str(tmp_path / "tokenizer")
    train = ("tokenizer", *source, "--out", out, "--vocab-size", "700", "--megabytes", "0.1", "--mix", "ko=1,en=1")
    run(monkeypatch, *train)
    assert "of 700 pieces" in capsys.readouterr().out
    run(monkeypatch, *train)
    assert "up to date" in capsys.readouterr().out
    tokens = str(tmp_path / "tokens")
    write = ("tokenize", *source, "--tokenizer", out, "--out", tokens, "--workers", "1")
    run(monkeypatch, *write)
    assert "math/math (train): 120 documents" in capsys.readouterr().out
    run(monkeypatch, *write)
    assert "up to date" in capsys.readouterr().out
    run(monkeypatch, "inspect", tokens)
    shown = capsys.readouterr().out
    assert json.loads(Path(tokens, "manifest.json").read_text())["tokenizer_hash"][:12] in shown
    assert "bytes/token" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tokenize", "--tokenizer", "none"), "no tokenizer.model at none"),
        (("tokenizer", "--source", "ko=none"), "got none"),
        (("tokenizer", "--source", "none"), "no such source: none"),
        (("tokenizer", "--mix", "ko"), "must be DOMAIN=SHARE"),
        (("inspect", "none"), "no manifest.json in none"),
        (("download", "--mirror", "none", "--only", "finemath"), "not in the mirror none"),
    ],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_loader_needs_numpy_and_torch_only() -> None:
    script = (
        "import sys, yaongi.data.loader; "
        "heavy = ('tyro', 'datasets', 'rensa', 'sentencepiece', 'tokenizers', 'pyarrow'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
