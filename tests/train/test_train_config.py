"""Presets, files and the command line."""

import sys
from pathlib import Path

import pytest
import torch
from small_run import TOML, arguments, changed, config_of

from yaongi.data.tokenizer import Tokenizer
from yaongi.model import compression_map
from yaongi.train.build import build_model
from yaongi.train.checkpoint.resume import differences
from yaongi.train.command_line import parse
from yaongi.train.config import as_dict, load_config
from yaongi.train.recompute import recomputed_layers
from yaongi.train.signals import resume_command

PRESETS = sorted(p.stem for p in (Path(__file__).resolve().parents[2] / "yaongi" / "presets").glob("*.toml"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads(name: str) -> None:
    """Load it, and check that its output folder has its name."""
    config = load_config(name)
    assert config.run.out == Path("runs") / name
    assert config.train.steps > 1


def test_every_field_can_be_overridden(tmp_path: Path) -> None:
    """Override fields of `Training`, `Running` and the model."""
    more = ["--tokens", "1e4", "--matrix-lr", "0.01", "--log-every", "7", "--model.experts", "6", "--fresh"]
    config = parse(arguments(tmp_path, tmp_path / "out", *more, "--model.engram.0.rows", "77"))
    assert (config.train.tokens, config.train.matrix_lr, config.run.log_every) == (1e4, 0.01, 7)
    assert (config.model.experts, config.model.engram[0].rows, config.run.fresh) == (6, 77, True)
    assert config.preset == "small"


def test_engram_can_be_left_out() -> None:
    assert parse(["--preset", "yaongi-4b", "--model.engram", "none"]).model.engram == ()
    assert parse(["--preset", "yaongi-4b"]).model.engram
    with pytest.raises(ValueError, match=r"^train: --model.engram must be none, to leave Engram out, got 'all'$"):
        parse(["--model.engram", "all"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model\n", "TOML"),
        (TOML + "speed = 3\n", "keys of .* must be among .*, got 'speed'"),
        (TOML.replace("tokens = 6144", 'tokens = "many"'), "tokens must be of type float"),
        (TOML.replace("log_every = 4", "log_every = 0"), "log_every must be 1 or more, got 0"),
        (TOML.replace("batch_tokens = 512", "batch_tokens = 500"), "multiple of row_tokens"),
        (TOML.replace("experts = 4", "experts = 1"), "experts_per_token"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, message: str) -> None:
    """Check that one line says what is wrong."""
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(str(path))


def test_no_such_preset() -> None:
    """Check that the message lists the presets."""
    with pytest.raises(FileNotFoundError, match="yaongi-4b"):
        load_config("yaongi-5b")


def test_differences(tmp_path: Path) -> None:
    """Check that only settings that decide the weights count, and that both values are shown."""
    config = parse(arguments(tmp_path, tmp_path / "out"))
    other = parse(arguments(tmp_path, tmp_path / "out", "--log-every", "9", "--keep-last", "5"))
    assert not differences(as_dict(config), as_dict(other))
    found = differences(as_dict(config), as_dict(changed(other, seed=3)))
    assert found == ["train.seed: the run has 0, got 3"]


def test_resume_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that it is the same command line, quoted, without the options that act once."""
    monkeypatch.setattr(sys, "orig_argv", ["python", "anything"])
    assert resume_command(["--fresh", "--out", "a b"]) == "python -m yaongi.train --out 'a b'"
    assert (
        resume_command(["--from-step", "9", "--out", "a"], from_step=6)
        == "python -m yaongi.train --out a --from-step 6"
    )
    for stop in (["--stop-after", "7"], ["--stop-after=7"], ["--stop_after", "7"], ["--from-step=7"]):
        assert resume_command([*stop, "--out", "a_b"]) == "python -m yaongi.train --out a_b"


@pytest.mark.parametrize(
    ("started", "words"),
    [
        (["python3.12", "-m", "yaongi.train", "--out", "a"], "python3.12 -m yaongi.train"),
        ([".venv/bin/python", "-m", "yaongi", "train"], ".venv/bin/python -m yaongi.train"),
        (["/usr/bin/python3", "/opt/env/bin/yaongi", "train"], "/opt/env/bin/yaongi train"),
    ],
)
def test_it_starts_as_this_program_was_started(started: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", started)
    assert resume_command(["--out", "a"]) == f"{words} --out a"


def test_the_command_on_the_path_is_named_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "yaongi").write_text("#!/bin/sh\n")
    (tmp_path / "yaongi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "orig_argv", ["python", str(tmp_path / "yaongi"), "train"])
    assert resume_command(["--out", "a"]) == "yaongi train --out a"


@pytest.mark.parametrize(
    ("policy", "layers"),
    [("none", ()), ("all", (0, 1, 2, 3, 4)), ("mamba", (0, 3)), ("attention,1", (1, 2)), ("0-2,experts", (0, 1, 2, 4))],
)
def test_layers_to_recompute(policy: str, layers: tuple[int, ...]) -> None:
    assert recomputed_layers(policy, "ME*ME") == layers


@pytest.mark.parametrize("policy", ["moe", "5", "3-9", "4-2", "1-", "-1", ""])
def test_no_such_layers_to_recompute(policy: str) -> None:
    with pytest.raises(ValueError, match=r"^config: recompute must (be none|name layers 0 to 4)"):
        recomputed_layers(policy, "ME*ME")


@pytest.mark.parametrize("variant", ["paper", "korean", "none"])
def test_the_compression_of_engram_is_a_field(tokens: Path, tmp_path: Path, variant: str) -> None:
    tokenizer = Tokenizer.load(tokens / "tokenizer")
    config = config_of(tokens, tmp_path / "out", "--engram-compression", variant)
    table = build_model(config, tokenizer, "cpu", dtype=torch.float32).backbone.compression
    if variant == "none":
        assert table is None
    else:
        assert table is not None
        assert table.tolist() == compression_map(tokenizer.pieces(), variant).tolist()  # type: ignore[arg-type]
