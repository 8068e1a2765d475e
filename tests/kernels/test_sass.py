"""Check the machine code of _C.so: registers, stack, spills and the instructions that each kernel must contain."""

import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest
from aot import disassemble

from yaongi.kernels.backend import LIBRARY_FILE

BUILD_LOG = LIBRARY_FILE.parent.parent / "build" / "build.log"

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed, so _C.so is not built")


@dataclass(frozen=True)
class Budget:
    """The most registers a kernel may use at entry, and patterns of what its code must contain."""

    registers: int
    instructions: tuple[str, ...]


BUDGETS = {
    "mamba_scan_backward_kernel": Budget(
        128, ("HGMMA", "LDSM", "STSM", "UTMALDG.3D", "UTMASTG.3D", "USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC")
    ),
    "moe_weight_gradient_kernel": Budget(168, ("HGMMA", "LDGSTS", "UTMALDG.3D", "UTMA(STG|REDG).3D", "USETMAXREG")),
    "symmetric_product_kernel": Budget(168, ("HGMMA", "UTMALDG.3D.MULTICAST", "UTMASTG", "USETMAXREG")),
}


@pytest.fixture(scope="module")
def usage() -> dict[str, dict[str, int]]:
    """Return resources by mangled kernel name."""
    text = disassemble(LIBRARY_FILE, "-res-usage")
    kernels = re.findall(r"Function (\S+):\s*\n\s*(.+)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)} for name, line in kernels}


@pytest.fixture(scope="module")
def code() -> dict[str, str]:
    """Return machine code by mangled kernel name."""
    parts = re.split(r"Function : (\S+)", disassemble(LIBRARY_FILE, "-sass"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def budget_of(name: str) -> Budget:
    """Return the budget of a mangled name; every kernel of the library must have one."""
    return next(budget for key, budget in BUDGETS.items() if key in name)


def test_every_budget_is_used(usage: dict[str, dict[str, int]]) -> None:
    """A kernel that was renamed or removed must be removed from the table too."""
    for key in BUDGETS:
        assert any(key in name for name in usage), f"no kernel is named {key}"


def test_registers_and_stack(usage: dict[str, dict[str, int]]) -> None:
    """Kernels stay within their budgets and use no local memory."""
    assert usage
    for name, resources in usage.items():
        assert resources["REG"] <= budget_of(name).registers, f"{name}: {resources}"
        assert resources["STACK"] == resources["LOCAL"] == 0, f"{name}: {resources}"


def test_instructions(code: dict[str, str]) -> None:
    """Tensor cores and TMA are used; no loads or stores of spilled registers."""
    assert code
    for name, sass in code.items():
        for instruction in budget_of(name).instructions:
            assert re.search(instruction, sass), f"{name} has no {instruction}"
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name} spills"


def test_wgmma_is_not_serialised() -> None:
    """ptxas prints only a note (C75xx), not an error, if it serialises wgmma or ignores setmaxnreg."""
    log = BUILD_LOG.read_text()
    if "no work to do" in log:
        pytest.skip("the last build compiled nothing; the one before would have been refused (setup.py)")
    assert "_C.so" in log
    assert "Used" in log or "Building CUDA" not in log, "the build's log holds no ptxas report"
    assert not re.search(r"C75\d\d", log)


def test_one_library_for_every_torch() -> None:
    """The library loads without libpython, the driver library or the CUDA runtime library."""
    dynamic = subprocess.run(["readelf", "-d", LIBRARY_FILE], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(\S+)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.match(r"lib(cuda|cudart|python|torch_cuda|torch_python)\b", name)]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
