"""What comes with the code: the image's recipe, changelog, citation, keys, the page on the kernels, types."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import yaongi
from yaongi import kernels

ROOT = Path(__file__).resolve().parent.parent
TYPED = """
import torch
from yaongi.kernels import moe, moe_route, newton_schulz, rms_norm, teon_update, use_backend

x, weight = torch.randn(8, 16), torch.ones(16)
y = rms_norm(x, weight)
ids, weights, load = moe_route(torch.randn(8, 4), torch.zeros(4), top_k=2)
z: torch.Tensor = moe(x, torch.randn(4, 16, 16), torch.randn(4, 16, 16), ids, weights)
with use_backend("reference"):
    direction: torch.Tensor = newton_schulz(z)
reveal_type(y)
newton_schulz(3)
"""


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def docker_lines() -> list[str]:
    """The recipe's instructions, continued lines joined."""
    lines = text("Dockerfile").replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_image_has_the_pins_of_the_one_click_run() -> None:
    """The torch for GPUs, the pinned packages, and the stamp that makes the script keep them."""
    (torch,) = set(re.findall(r"torch==[\d.]+", text("Dockerfile")))
    assert f'torch="{torch}" # brings Triton' in text("run_all_vessl.sh")
    runs = [line.removeprefix("RUN ") for line in docker_lines() if line.startswith("RUN ")]
    assert f"pip install {torch}" in runs
    assert any("-r requirements-dev.txt" in run and f"echo {torch} && cat requirements-dev.txt" in run for run in runs)
    assert {"COPY requirements-dev.txt .", "COPY . ."} <= set(docker_lines())
    assert ".env" in text(".dockerignore").splitlines()  # keys never go into an image


@pytest.mark.long
def test_the_lines_of_the_image_run(tmp_path: Path) -> None:
    """All RUN lines but the system's packages, in a copy of the tree and a fresh environment, without nvcc."""
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    subprocess.run(["cp", "--parents", *listed, str(tmp_path)], cwd=ROOT, check=True)
    path = f"{tmp_path / '.venv' / 'bin'}:{os.environ['PATH']}"
    for line in docker_lines():
        if line.startswith("RUN ") and "apt-get" not in line:
            run = line.removeprefix("RUN ").replace("YAONGI_CUDA=1", "YAONGI_CUDA=0")
            subprocess.run(run, shell=True, check=True, cwd=tmp_path, env={**os.environ, "PATH": path})
    said = subprocess.check_output([str(tmp_path / ".venv" / "bin" / "yaongi"), "--version"], cwd="/", text=True)
    assert said.strip() == yaongi.__version__


def test_changelog_and_citation_name_the_version() -> None:
    newest = re.search(r"^## (\S+), (\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == yaongi.__version__
    assert re.search(r"^version: (\S+)$", text("CITATION.cff"), re.MULTILINE)[1] == newest[1]  # type: ignore[index]
    assert re.search(r"^date-released: (\S+)$", text("CITATION.cff"), re.MULTILINE)[1] == newest[2]  # type: ignore[index]


def test_every_key_has_its_line() -> None:
    """The keys that the code reads from the environment, and no value."""
    lines = [line for line in text(".env.example").splitlines() if not line.startswith("#")]
    keys = {line.partition("=")[0]: line.partition("=")[2].partition("#")[0].strip() for line in lines}
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "yaongi").rglob("*.py")]
    read = set(re.findall(r'environ(?:\.get\(|\[)"(\w+_API_KEY|\w+_TOKEN)"', "".join(sources)))
    assert read <= keys.keys()
    assert set(keys.values()) == {""}


def test_the_page_on_the_kernels_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", text("docs/kernels.md"), re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([256, 64]) torch.Size([8, 32, 64])\n"
    assert set(re.search(r"from yaongi.kernels import (.*)", example)[1].split(", ")) <= set(kernels.__all__)  # type: ignore[index]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md", "docs/kernels.md", "docs/clusters.md"])
def test_what_a_page_names_is_there(page: str) -> None:
    """Files in backticks and links of the pages beside the README."""
    named = [word for code in re.findall(r"`([^`\n]+)`", text(page)) for word in shlex.split(code, posix=False)]
    paths = {name for name in named if re.fullmatch(r"(yaongi|tests|benchmarks|csrc|docs)/[\w./]+\.\w+", name)}
    links = re.findall(r"\]\((?!http)([\w./]+)", text(page))
    missing = [name for name in paths if not (ROOT / name).exists()]
    missing += [name for name in links if not ((ROOT / page).parent / name).exists()]
    assert not missing


@pytest.mark.long
def test_public_ops_are_typed_for_their_users(tmp_path: Path) -> None:
    """`mypy --strict` of a program that uses the package: its types are known, and a wrong call is found."""
    (tmp_path / "program.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "program.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    lines = [re.sub(r"^program.py:(\d+): ", r"\1 ", line) for line in done.stdout.splitlines()]
    assert len(lines) == 3, done.stdout
    assert 'note: Revealed type is "torch._tensor.Tensor' in lines[0].replace("Union[", "")
    assert 'Argument 1 to "newton_schulz" has incompatible type "int"; expected "Tensor"' in lines[1]
