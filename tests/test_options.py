"""Every option of every command has help, and the trainer's do something."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, get_args, get_origin

import pytest
from programs import run_module

from yaongi import cli
from yaongi.data.pieces import CONTROL_PIECES
from yaongi.model import Yaongi
from yaongi.model.config import EngramConfig, ModelConfig, PrecisionConfig
from yaongi.model.generation import generate
from yaongi.train.build import fit_to_data
from yaongi.train.command_line import DERIVED, parse
from yaongi.train.config import Running, Training, load_config

PACKAGE = Path(__file__).resolve().parent.parent / "yaongi"
COMMANDS = [
    *("train", "train.report", "tune", "generate", "chat", "serve", "export", "model count"),
    *(f"eval {command}" for command in ("bpb", "passkey", "tasks", "fetch", "report")),
    *(f"eval logickor {command}" for command in ("generate", "judge")),
    *(f"data {stage}" for stage in ("download", "benchmarks", "tokenizer", "tokenize", "chat", "inspect")),
]
MODEL = ("--preset", "yaongi-tiny")
OTHERS = {  # values for the fields that take no arbitrary number or word
    "pattern": "MEM*MM",
    "hidden_size": 256,
    "mamba_groups": 4,
    "attention_kv_heads": 4,
    "mix": "ko=1",
    "stacked": "mamba",
    "wandb_tags": ("a", "b"),
    "recompute": "all",
    "orders": (2, 4),
    "stop_token_ids": (4, 5),
    "high_layers": (0,),
    "row_tokens": 256,
    "batch_tokens": 8192,
    "layer": 1,
    "gate": "demo",
}
WITH = {"--model.precision.experts": ("--model.precision.shared-experts", "fp8")}  # what an option needs beside it


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, *stage = command.split()
    monkeypatch.setenv("COLUMNS", "300")
    text = run_module(f"yaongi.{module}", *stage, "--help").stdout
    # of a group's first line, its description, there is a rule below
    options = re.findall(r"^│ ([-\[\w].*?)(?: {2,}(.*?))? *│$(?!\n│ ─)(?:\n^│ {6,}(\S.*?) *│$)?", text, re.MULTILINE)
    assert options, text
    for option, beside, below in options:
        assert re.match(r"[^(\s]", beside or below), f"{option} has no help"


class Data:
    """Stands for a tokenizer and a loader."""

    vocab_size = 4096
    pad_id, bos_id, eos_id = (CONTROL_PIECES.index(piece) for piece in ("<|pad|>", "<|bos|>", "<|eos|>"))
    mix: ClassVar = {"ko": 1.0}
    tokens: ClassVar = {"ko": 10**9}
    mixture = SimpleNamespace(shares={"ko": 1.0})


def other_value(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """Return a value of the field's type that differs from its default."""
    if field.name in OTHERS:
        return OTHERS[field.name]
    if isinstance(value, bool):
        return not value
    if get_origin(field.type) is Literal:
        return next(v for v in get_args(field.type) if v != value)
    if isinstance(value, int):
        return value * 2 or 3
    if isinstance(value, float):
        return value / 2 or 0.25
    return Path("elsewhere") if field.type in (Path, Path | None) else "elsewhere"


def options() -> Iterator[Any]:
    """Yield option, path of its field in the configuration, and the field, for every field of a configuration."""
    for kind, flag, path in (
        (Training, "", "train"),
        (Running, "", "run"),
        (ModelConfig, "model.", "model"),
        (EngramConfig, "model.engram.0.", "model.engram.0"),
        (PrecisionConfig, "model.precision.", "model.precision"),
    ):
        for field in dataclasses.fields(kind):
            if field.name not in ("engram", "precision"):
                option = f"--{flag}{field.name}".replace("_", "-")
                yield pytest.param(option, f"{path}.{field.name}", field, id=option)


def value_at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config[int(name)] if name.isdecimal() else getattr(config, name)
    return config


@pytest.mark.parametrize(("option", "path", "field"), list(options()))
def test_no_option_is_ignored(option: str, path: str, field: "dataclasses.Field[Any]") -> None:
    """Its value is in the configuration that training goes by, or it is refused in one line that names it."""
    value = other_value(field, value_at(parse(MODEL), path))
    words = [f"--no-{option[2:]}" if value is False else option]
    words += [] if isinstance(value, bool) else [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
    if value is False and "." in option:
        head, _, tail = option.rpartition(".")
        words = [f"{head}.no-{tail}"]
    if option in DERIVED:
        with pytest.raises(ValueError, match=rf"^train: {option} must be left out: .* sets it$"):
            parse([*MODEL, *words])
        return
    config = fit_to_data(parse([*MODEL, *words, *WITH.get(option, ())]), Data(), Data())  # type: ignore[arg-type]
    assert value_at(config, path) == value


@pytest.mark.parametrize("kind", [Training, Running, ModelConfig, EngramConfig, PrecisionConfig])
def test_every_field_is_read(kind: Any) -> None:
    """Somewhere outside of the checks of its own class, or by its name in a string."""
    read: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
    assert {field.name for field in dataclasses.fields(kind)} - read == set()


def test_numbers_with_units() -> None:
    """As the plan prints them."""
    config = parse([*MODEL, "--tokens", "15B", "--batch-tokens=4.096k", "--row_tokens", "512"])
    assert (config.train.tokens, config.train.batch_tokens) == (15e9, 4096)
    assert cli.with_digits(["--tokens", "1.5M", "--out", "4k"], ("--tokens",)) == ["--tokens", "1500000", "--out", "4k"]


def error_of(*words: str) -> str:
    """Run a command that fails, and return what it prints."""
    done = run_module(*words)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


@pytest.mark.parametrize("command", [("yaongi.generate", "--prompt", "a"), ("yaongi.export", "--gguf", "out.gguf")])
def test_a_folder_without_a_model(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Name the command that writes a model, the model of a run, or what the folder lacks: never a new tokenizer."""
    made = "python -m yaongi.train --out RUN writes a model to RUN/model"
    start = "error: from_pretrained: folder must"
    assert error_of(*command, str(tmp_path)) == f"{start} hold config.json, got {tmp_path}; {made}\n"
    tiny = Yaongi(load_config("yaongi-tiny").model)
    tiny.save_pretrained(tmp_path / "run" / "model")
    model = tmp_path / "run" / "model"
    more = ["--drop-engram"] if "yaongi.export" in command else []
    rule = "folder must hold tokenizer.model, the tokenizer that the model was trained with"
    for folder in (model, model.parent):  # of a run without checkpoints, its model
        done = run_module(*command, folder, *more)
        assert done.stderr == f"error: tokenizer: {rule}, got {model}\n"
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    begun = f"{start} hold a checkpoint or a model, got the run {tmp_path / 'begun'}\n"
    assert error_of(*command, str(tmp_path / "begun")) == begun


def test_too_many_tokens_to_generate() -> None:
    model = Yaongi(load_config("yaongi-tiny").model)
    for count in (0, 1024, 2000):
        rule = rf"generate: max_new_tokens must be 1 to 1023, below max_sequence_length, got {count}$"
        with pytest.raises(ValueError, match=rule):
            generate(model, [[1, 2]], max_new_tokens=count)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--row-tokens", "2048"),
            "config: row_tokens must be at most the model's max_sequence_length, 1024, got 2048",
        ),
        (("--fresh", "--from-step", "3"), "config: from_step must be 0 with fresh, got 3"),
    ],
)
def test_options_that_contradict_each_other(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse([*MODEL, *words])
