"""What csrc/cublaslt.cpp asks of cuBLASLt, without a GPU: a stand-in library computes by what each argument means."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed, so nothing is built")

MATMUL = "_Z13yaongi_matmulRK12YaongiMatmulPvmP11CUstream_st"  # the seam's functions, by their mangled names
VERSION = "_Z23yaongi_cublaslt_versionv"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TYPES = {torch.bfloat16: 1, torch.float32: 2, E4M3: 3, E5M2: 4}  # YaongiType


class Matrices(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("batch", "rows", "columns", "row_stride", "batch_stride")
    ]


class Matmul(ctypes.Structure):
    _fields_ = [
        *((name, Matrices) for name in ("a", "b", "addend", "out")),
        *((name, ctypes.c_int) for name in ("a_type", "b_type", "out_type")),
        *((name, ctypes.c_void_p) for name in ("unit_a", "unit_b")),
        ("exact", ctypes.c_bool),
        ("device", ctypes.c_int),
    ]


def matrices(t: torch.Tensor | None) -> Matrices:
    return Matrices() if t is None else Matrices(t.data_ptr(), 1, *t.shape, t.stride(0), 0)


class Seam:
    """yaongi_matmul on CPU tensors."""

    def __init__(self, folder: str) -> None:
        library = ctypes.CDLL(f"{folder}/seam.so")
        self.matmul, self.version = library[MATMUL], library[VERSION]
        self.matmul.restype, self.version.restype = ctypes.c_char_p, ctypes.c_int64
        self.stand_in = ctypes.CDLL(f"{folder}/libcublasLt.so.13")
        self.workspace = torch.empty(4096, dtype=torch.uint8)

    def __call__(self, a, b, units, addend, out, exact=True, device=0) -> str | None:  # type: ignore[no-untyped-def]
        problem = Matmul(
            *(matrices(t) for t in (a, b, addend, out)),
            *(TYPES[t.dtype] for t in (a, b, out)),
            *(u.data_ptr() for u in units),
            exact,
            device,
        )
        size = ctypes.c_size_t(self.workspace.numel())
        workspace = ctypes.c_void_p(self.workspace.data_ptr())
        message = self.matmul(ctypes.byref(problem), workspace, size, None)
        return message.decode() if message else None

    def counts(self) -> list[int]:
        """Objects alive, heuristics asked, handles made, and calls with fast accumulation."""
        return [self.stand_in.counts(i) for i in range(4)]


def codes(rows: int, columns: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    return torch.randn(rows, columns).to(dtype)


def check(folder: str) -> None:
    """Run in a process of its own, whose loader finds the stand-in."""
    seam, vector = Seam(folder), torch.tensor([0.5, 0.0, 0.0, 0.0, 4.0])  # 16 bytes apart
    units = vector[0], vector[4]
    assert seam.version() == 130101
    for kinds in ((E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)):
        a, b = codes(6, 96, kinds[0])[1:, 16:64], codes(32, 48, kinds[1])
        wanted = 2 * a.double() @ b.double().T
        for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 4e-3)):
            out, addend = torch.full((5, 32), torch.nan, dtype=dtype), torch.randn(5, 40, dtype=dtype)[:, :32]
            assert seam(a, b, units, None, out) is None
            torch.testing.assert_close(out.double(), wanted, rtol=rtol, atol=1e-4)
            assert seam(a, b, units, addend, out) is None
            torch.testing.assert_close(out.double(), wanted + addend.double(), rtol=2 * rtol, atol=0.05)
        total = torch.ones(5, 48)[:, 8:-8]
        for _ in range(2):
            assert seam(a, b, units, total, total) is None
        torch.testing.assert_close(total.double(), 1 + 2 * wanted, rtol=1e-5, atol=1e-4)
    a, out = codes(1, 48).as_strided((1, 48), (7, 1)), torch.empty(1, 32)  # a single row's stride is nobody's
    assert seam(a, codes(32, 48), units, None, out) is None

    before = seam.counts()
    assert before[2:] == [1, 0]
    for _ in range(3):  # a plan is made once, and another for fast accumulation and for another device
        assert seam(a, b, units, None, out) is None
        assert seam(a, b, units, None, out, exact=False) is None
        assert seam(a, b, units, None, out, device=1) is None
    after = seam.counts()
    assert after[1] - before[1] <= 3
    assert after[2:] == [2, 3]
    message = seam(a, b, (vector[1], vector[4]), None, out)
    assert message == "cublasLtMatmul returned cuBLAS status 7"
    half = codes(5, 48, E5M2), codes(32, 48, E5M2)
    wanted_message = "cuBLASLt has no algorithm for M = 5, N = 32, K = 48 (status 15)"
    assert seam(*half, units, None, torch.empty(5, 32)) == wanted_message
    per_plan = 6  # a descriptor, four layouts, a preference
    assert seam.counts()[0] == after[0], "a plan that failed left objects behind"
    for rows in range(1, 700):
        assert seam(codes(rows, 16), codes(16, 16), units, None, torch.empty(rows, 16)) is None
    assert seam.counts()[0] <= 512 * per_plan, "plans are never forgotten"


def compile_library(source: Path, target: Path) -> None:
    flags = ["-shared", "-Xcompiler", "-fPIC", "-std=c++17", f"-I{ROOT / 'csrc'}", "-ldl"]
    done = subprocess.run(["nvcc", source, "-o", target, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cublaslt")
    compile_library(ROOT / "csrc/cublaslt.cpp", folder / "seam.so")
    compile_library(HERE / "stand_in_cublaslt.cpp", folder / "libcublasLt.so.13")
    return folder


def test_products_plans_and_errors(folder: Path) -> None:
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([sys.executable, __file__, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_the_library(folder: Path) -> None:
    """A torch without CUDA has none: version 0, and one line for who calls all the same."""
    probe = f"import ctypes; print(ctypes.CDLL('{folder}/seam.so')['{VERSION}']())"
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    if int(done.stdout):
        pytest.skip("the loader finds a cuBLASLt on this machine")
    matmul = ctypes.CDLL(f"{folder}/seam.so")[MATMUL]
    matmul.restype = ctypes.c_char_p
    message = matmul(ctypes.byref(Matmul()), None, ctypes.c_size_t(0), None)
    assert message == b"torch has no libcublasLt.so.13"


if __name__ == "__main__":
    check(sys.argv[1])
