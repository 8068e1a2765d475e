"""Both READMEs and the pages: every command in them is one that this code understands. The READMEs say the same."""

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from yaongi import cli
from yaongi.__main__ import COMMANDS
from yaongi.model import ModelConfig
from yaongi.presets import read_preset
from yaongi.train.command_line import parse as parse_train
from yaongi.tune.command_line import parse as parse_tune

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, KOREAN = "README.md", "README.ko.md"
PAGES = [
    ENGLISH,
    KOREAN,
    "CONTRIBUTING.md",
    *(f"docs/{name}.md" for name in ("clusters", "kernels", "serving", "trillion", "tuning")),
]
OTHERS = ("pip", "./run_tests.sh", "curl", "lm_eval", "vllm")  # programs of others, and one without options
PARSERS: dict[str, Any] = {"yaongi.train": parse_train, "yaongi.tune": parse_tune}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(name), re.MULTILINE | re.DOTALL)


def commands(name: str) -> Iterator[str]:
    """Yield the lines of shell blocks without comments, and what stands in backticks and begins as a command does."""
    for block in blocks(name, "bash"):
        yield from (re.sub(r"\s+#.*", "", line) for line in block.replace("\\\n", " ").splitlines() if line)
    outside = re.sub(r"^```.*?^```", "", text(name), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", outside):
        if re.search("NAME|이름", code):
            continue  # the form of all commands
        if re.match(r"(\./|yaongi |python |torchrun |pytest |pip |\.venv/)", code) and re.search(r"\w \S", code):
            yield code


def understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Parse a command of the package as its program does, without running it; of others look up what they name."""
    if words[0].endswith("bin/yaongi"):
        words = ["yaongi", *words[1:]]
    if words[0] in ("python", "torchrun") or words[0].endswith("bin/python"):
        module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    elif words[0] == "yaongi" and words[1].startswith("--"):
        return words[1:] in (["--help"], ["--version"])
    elif words[0] == "yaongi" and " ".join(words[1:]) in (*COMMANDS, "data chat"):
        return True  # the name of a command alone
    elif words[0] == "yaongi":
        module, arguments = COMMANDS[words[1]][0], words[2:]
    elif words[0] == "./run_all_vessl.sh":
        usage = text("run_all_vessl.sh").partition("TEXT\n}")[0]
        return all(f"  {word} " in usage or f"{word}\n" in usage for word in words[1:] if word.startswith("--"))
    elif words[0] == "pytest":
        return all((ROOT / word).exists() for word in words[1:] if "/" in word)
    else:
        return words[0] in OTHERS
    if module == "pytest":
        return understood(["pytest", *arguments], monkeypatch)
    if module.startswith("benchmarks."):
        return (ROOT / f"{module.replace('.', '/')}.py").is_file()
    if module in PARSERS:
        PARSERS[module](arguments)
        return True
    monkeypatch.setattr(cli, "run", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    name = module if (ROOT / f"{module.replace('.', '/')}.py").is_file() else f"{module}.__main__"
    importlib.import_module(name).main()
    return True


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in commands(page)}))
def test_every_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that is gone or misspelt ends the parser. `RUN` is of a preset's form."""
    tables = read_preset("yaongi-tiny")
    for module in ("yaongi.train.config", "yaongi.tune.command_line"):
        monkeypatch.setattr(f"{module}.read_init", lambda _: (ModelConfig.from_dict(tables["model"]), tables["train"]))
    assert understood(shlex.split(command.replace("…", "").replace("'오늘은'", "x")), monkeypatch)


def test_a_wrong_option_is_not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    for command in ("yaongi report RUN --wach 60", "yaongi train --prest yaongi-4b", "yaongi eval bpb RUN --dat T"):
        with pytest.raises(SystemExit):
            understood(command.split(), monkeypatch)
    assert not understood(["./run_all_vessl.sh", "--sauce", "ko=x"], monkeypatch)
    assert not understood(["nvidia-smi"], monkeypatch)


def test_the_korean_readme_has_the_same_commands() -> None:
    """Up to the numbers, which the Korean one leaves to the English one."""
    for language in ("bash", "python"):
        mine, theirs = (
            [[re.sub(r"\s+#.*", "", line) for line in block.splitlines()] for block in blocks(name, language)]
            for name in (ENGLISH, KOREAN)
        )
        assert mine == theirs, language
    assert set(commands(KOREAN)) <= set(commands(ENGLISH))


def test_the_korean_readme_has_the_same_tables_and_links() -> None:
    """Row by row the same code and the same numbers; the same headings in number, pictures and pages."""
    english, korean = text(ENGLISH).partition("\n## Numbers")[0], text(KOREAN).partition("\n## 숫자")[0]
    for pattern in (r"^## ", r"^!\[.*\]\((.*)\)", r"\]\((docs/[^)]*)\)"):
        assert re.findall(pattern, english, re.MULTILINE) == re.findall(pattern, korean, re.MULTILINE)
    rows = [re.findall(r"^\|.*\|$", page, re.MULTILINE) for page in (english, korean)]
    assert len(rows[0]) == len(rows[1])
    for mine, theirs in zip(*rows, strict=True):
        assert re.findall(r"`[^`]*`", mine) == re.findall(r"`[^`]*`", theirs)
        assert re.findall(r"\d+(?:\.\d+)?", mine) == re.findall(r"\d+(?:\.\d+)?", theirs)


@pytest.mark.parametrize("page", [ENGLISH, KOREAN])
def test_what_they_link_is_there(page: str) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", text(page))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
