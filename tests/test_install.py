"""The package as a user installs it: a wheel, outside the checkout, whose commands find all that they need."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from yaongi import cli
from yaongi.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]
TINY = ["--tokens", "2048", "--batch-tokens", "1024", "--row-tokens", "128", "--evaluate-rows", "1"]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but an installed wheel, built from a copy of the source without its build folder."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, env={**os.environ, "YAONGI_CUDA": "0"})
    return site


@pytest.fixture
def run(site: Path, tmp_path: Path) -> Run:
    """Run `yaongi …` of the wheel in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [str(site / "bin" / "yaongi"), *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env={**environment, **more}, capture_output=True, text=True, timeout=300
        )

    return run


def write_text(folder: Path) -> None:
    random = Random(0)
    for domain in ("ko", "en", "code", "math"):
        for split, count in (("train", 60), ("val", 8)):
            (folder / split / domain).mkdir(parents=True)
            for i in range(count):
                text = " ".join("".join(random.choices("abcdefghij가나다라마바사아", k=4)) for _ in range(40))
                (folder / split / domain / f"{i}.txt").write_text(text)


ONLY_REQUIRED = r"""
import importlib.metadata as metadata, re, sys
from importlib.machinery import PathFinder

distributions = {}
for found in metadata.distributions():  # the wheel comes before the checkout
    distributions.setdefault(re.sub("[-_.]+", "-", found.metadata["Name"]).lower(), found)
wanted, todo = set(), ["yaongi"]
while todo:
    name = re.sub("[-_.]+", "-", todo.pop()).lower()
    if name in distributions and name not in wanted:
        wanted.add(name)
        lines = [line for line in distributions[name].requires or [] if "extra ==" not in line]
        todo += [re.match(r"[\w.-]+", line)[0] for line in lines]
owners = metadata.packages_distributions()


class Required(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = {re.sub("[-_.]+", "-", owner).lower() for owner in owners.get(name.partition(".")[0], ())}
        return None if found and not found & wanted else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Required
"""


def test_what_is_required_is_enough(run: Run, site: Path, tmp_path: Path) -> None:
    """A wheel goes from text to the report with what `pip install yaongi` brings, outside the checkout.

    Packages of extras alone can't be imported.
    What needs an extra names it in one line.
    """
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "sitecustomize.py").write_text(ONLY_REQUIRED)
    path = {"PYTHONPATH": f"{tmp_path / 'only'}:{site}"}
    write_text(tmp_path / "text")
    tokenize = ["data", "tokenize", "--source", "text", "--tokenizer", "tokenizer", "--out", "tokens"]
    for command in (
        ["data", "tokenizer", "--source", "text", "--out", "tokenizer", "--vocab-size", "600"],
        [*tokenize, "--no-near-duplicates"],
        ["train", "--preset", "yaongi-tiny", "--data", "tokens", "--out", "run", *TINY],
        ["report", "run"],
        ["generate", "run", "--prompt", "가나", "--max-new-tokens", "2"],
        ["export", "run/model", "--out", "hf", "--drop-engram"],
    ):
        done = run(*command, **path)
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
    assert (site / "yaongi" / "py.typed").is_file()
    for command, package, extra in (
        (tokenize, "rensa", "data"),
        (["export", "run/model", "--gguf", "file", "--drop-engram"], "gguf", "gguf"),
        (["eval", "tasks", "run", "--suite", "quick", "--out", "scores"], "lm_eval", "eval"),
    ):
        done = run(*command, **path)
        wanted = f"error: {package} must be installed (pip install 'yaongi[{extra}]'), got none\n"
        assert (done.returncode, done.stderr) == (1, wanted), command


def test_extras_are_pinned_and_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """CI pins what `[all]` brings, and `cli` names the extra of each optional package."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    extras = runpy.run_path(str(ROOT / "setup.py"))["EXTRAS"]
    names = {re.match(r"[\w.-]+", line)[0]: extra for extra, lines in extras.items() for line in lines}  # type: ignore[index]
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE))
    assert {re.match(r"[\w.-]+", line)[0] for line in extras["all"]} <= pinned.keys()  # type: ignore[index]
    for module, extra in cli.EXTRAS.items():
        assert module.replace("_", "-") in {name.replace("_", "-") for name in names}
        assert any(line.replace("_", "-").startswith(module.replace("_", "-")) for line in extras[extra])


def test_a_wheel_counts_and_lists_its_presets(run: Run) -> None:
    count = run("model", "count", "yaongi-4b")
    assert "4,278,461,952" in count.stdout, count.stderr
    unknown = run("model", "count", "yaongi-9b")
    assert unknown.returncode == 1
    assert "yaongi-4b, yaongi-4b-fp8, yaongi-4b-pairs, yaongi-small, yaongi-tiny" in unknown.stderr


def test_a_wheel_says_what_it_is(site: Path) -> None:
    (metadata,) = site.glob("yaongi-*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    for wanted in (
        "Keywords: ",
        "Classifier: Typing :: Typed",
        "Description-Content-Type: text/markdown",
        "# Open-Yaongi",
    ):
        assert wanted in text


@pytest.mark.parametrize(
    ("origin", "home"),
    [
        ("https://name:secret@code.example/lab/yaongi.git", "https://code.example/lab/yaongi"),
        ("git@code.example:lab/yaongi.git", "https://code.example/lab/yaongi"),
        ("ssh://git@code.example/lab/yaongi", "https://code.example/lab/yaongi"),
        ("/srv/mirrors/yaongi.git", None),
        ("", None),
    ],
)
def test_the_project_urls_are_those_of_the_clone(origin: str, home: str | None, tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "yaongi").mkdir()
    shutil.copy(ROOT / "yaongi" / "__init__.py", tmp_path / "yaongi")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "config", "remote.origin.url", origin], check=True)
    probe = "import setuptools; setuptools.setup = lambda **k: None; import setup; print(setup.project_urls())"
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str({"Source": home, "Issues": f"{home}/issues"} if home else {})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_its_module(name: str, run: Run, site: Path, tmp_path: Path) -> None:
    """`yaongi NAME --help` says what `python -m MODULE --help` says."""
    module, _ = COMMANDS[name]
    assert importlib.util.find_spec(module)
    direct = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert direct.returncode == 0, direct.stderr
    assert f"usage: python -m {module}" in direct.stdout
    assert run(name, "--help").stdout == direct.stdout


def test_the_command_lists_its_commands(run: Run) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
        assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert run("--version").stdout.strip() == "0.1.0"
    wrong = run("trian")
    named = ", ".join(COMMANDS)
    assert wrong.returncode == 1
    assert wrong.stderr == f"error: yaongi: command must be one of {named}, got 'trian'\n"
