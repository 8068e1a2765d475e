"""The house's own rules: who may import whom, what importing costs, and that the README's commands exist."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "kernels": {"model", "train", "data", "eval"},
    "model": {"train", "data", "eval"},
    "data": {"kernels", "model", "train", "eval"},
    "train": set(),
    "eval": {"train"},
}


def imports_of(path: Path) -> Iterator[str]:
    """The dotted names a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(room: str) -> list[Path]:
    """The Python files of a room of the package."""
    return sorted((ROOT / "yaongi" / room).rglob("*.py"))


@pytest.mark.parametrize("room", FORBIDDEN)
def test_import_direction(room: str) -> None:
    """csrc ← kernels ← model ← train; data beside train."""
    for path in files_of(room):
        for name in imports_of(path):
            parts = name.split(".")
            assert not (parts[0] == "yaongi" and len(parts) > 1 and parts[1] in FORBIDDEN[room]), f"{path}: {name}"


def test_references_import_only_torch() -> None:
    """A reference teaches the mathematics and needs nothing else."""
    references = sorted((ROOT / "yaongi" / "kernels").rglob("reference.py"))
    assert references
    for path in references:
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert roots - sys.stdlib_module_names <= {"torch"}, f"{path}: {roots}"


def test_only_triton_impl_imports_triton() -> None:
    """So that importing yaongi needs nothing but torch."""
    for path in (ROOT / "yaongi").rglob("*.py"):
        if path.name != "triton_impl.py":
            assert not any(name.split(".")[0] == "triton" for name in imports_of(path)), path


@pytest.mark.parametrize("room", ["symmetric_product", "causal_conv1d", "moe", "newton_schulz", "norm", "mamba_scan"])
def test_a_room_is_complete(room: str) -> None:
    """Mathematics, reference and registration in every room."""
    folder = ROOT / "yaongi" / "kernels" / room
    assert {"README.md", "reference.py", "op.py", "__init__.py"} <= {path.name for path in folder.iterdir()}


def test_importing_yaongi_is_light() -> None:
    """`import yaongi` takes at most 2 s and brings neither torch nor Triton; the kernels bring only torch."""
    start = time.perf_counter()
    probe = "import sys, yaongi; print(sorted(m for m in ('torch', 'triton', 'datasets', 'wandb') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    assert time.perf_counter() - start <= 2
    assert done.stdout.strip() == "[]"
    probe = "import sys, yaongi.kernels; print('triton' in sys.modules or 'datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_torch_is_no_build_requirement() -> None:
    """pip would fetch gigabytes into a throw-away environment."""
    build_system = (ROOT / "pyproject.toml").read_text().split("[tool", 1)[0]
    assert "torch" not in build_system.split("requires = ", 1)[1].split("\n", 1)[0].split("#")[0]
