"""setup.py's decisions on different machines, and its one-line error if it can't build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def setup_py(tmp_path: Path, *, nvcc: bool, torch: bool, cmake: bool = True, **environment: str) -> tuple[int, str]:
    """Run `setup.py --name` on a simulated machine; return its exit code and output."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, wanted in (("nvcc", nvcc), ("cmake", cmake)):
        if wanted:
            (tools / name).write_text("#!/bin/sh\n")
            (tools / name).chmod(0o755)
    script = "import sys, sysconfig, importlib.util as u; sys.argv = ['setup.py', '--name']\n"
    if not torch:
        script += f"sysconfig.get_path = lambda *a, **k: {str(tmp_path)!r}\n"
        script += "find = u.find_spec; u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
    script += f"__file__ = {str(ROOT / 'setup.py')!r}; exec(compile(open(__file__).read(), __file__, 'exec'))\n"
    home = {} if nvcc else {"CUDA_HOME": str(tmp_path)}
    clean = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_HOME", "YAONGI_CUDA")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean | {"PATH": str(tools)} | home | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_without_nvcc_it_installs_and_says_what_is_missing(tmp_path: Path) -> None:
    code, output = setup_py(tmp_path, nvcc=False, torch=True)
    assert code == 0
    assert "nvcc was not found, so the CUDA kernels are not built; Triton and the references remain" in output


def test_without_nvcc_but_asked_to_build_it_fails(tmp_path: Path) -> None:
    code, output = setup_py(tmp_path, nvcc=False, torch=True, YAONGI_CUDA="1")
    assert code != 0
    assert (
        output.strip() == "yaongi: YAONGI_CUDA=1 but nvcc was not found: install CUDA 13 or set CUDACXX=/path/to/nvcc"
    )


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_with_nvcc_and_no_torch_it_says_what_to_type(tmp_path: Path, mode: str) -> None:
    code, output = setup_py(tmp_path, nvcc=True, torch=False, YAONGI_CUDA=mode)
    assert code != 0
    assert output.strip() == (
        "yaongi: building the CUDA kernels needs torch: `pip install torch` first (or YAONGI_CUDA=0 to skip)"
    )


def test_without_cmake_it_says_what_to_type(tmp_path: Path) -> None:
    code, output = setup_py(tmp_path, nvcc=True, torch=True, cmake=False)
    assert code != 0
    assert output.strip() == (
        "yaongi: building the CUDA kernels needs cmake: `pip install cmake ninja` first (or YAONGI_CUDA=0)"
    )


def test_zero_never_builds(tmp_path: Path) -> None:
    code, output = setup_py(tmp_path, nvcc=True, torch=False, YAONGI_CUDA="0")
    assert (code, output.strip()) == (0, "yaongi")


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    code, output = setup_py(tmp_path, nvcc=True, torch=True, YAONGI_CUDA="yes")
    assert code != 0
    assert output.strip() == "yaongi: YAONGI_CUDA must be auto, 0 or 1, got 'yes'"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed, so _C.so is not built")
def test_the_library_loads_beside_this_torch() -> None:
    """The library loads on a CPU build of torch too, and defines the op."""
    probe = (
        "import torch; from yaongi.kernels.backend import LIBRARY_FILE; torch.ops.load_library(str(LIBRARY_FILE)); "
        "print(torch.ops.yaongi_cuda.symmetric_product.default._schema)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Tensor(a!) out" in done.stdout
