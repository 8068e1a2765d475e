"""Compile Triton kernels for any GPU on a machine without one, through their launchers.

Within `compiled_launches` a launcher runs on meta tensors. Each kernel that it would launch is instead compiled with
the launch's argument types, constants and alignments. So every config of a launcher's table can be checked for
registers, spills and tensor-core instructions.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from yaongi.kernels.common import generations, launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """Resources and machine code of one kernel."""

    name: str
    constants: dict[str, Any]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    sass: str

    @property
    def early_loads(self) -> int:
        """How many loads come before the wait for the kernel ahead: what that one writes must not be among them."""
        before, wait, _ = self.sass.partition("ACQBULK")
        assert wait, f"{self.name} doesn't wait"
        return len(re.findall(r"\bLDG", before))

    @property
    def rare(self) -> bool:
        """Whether it computes only where something isn't finite: how fast it is doesn't matter."""
        return bool(self.constants.get("ISOLATE"))


@contextmanager
def compiled_launches(capability: int = 90) -> Iterator[list[Compiled]]:
    """Within the block, compile each launched Triton kernel for a compute capability and append it to the list."""
    compiled: list[Compiled] = []

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch.check_arguments(self, len(args))
        compiled.append(_compile(self, args, kwargs, capability))

    generation = mock.patch.object(generations, "generation_of", return_value=capability // 10)
    through_triton = mock.patch.object(launch, "DIRECT", False)
    with generation, through_triton, mock.patch.object(JITFunction, "run", compile_instead):
        yield compiled


def compile_launcher(launcher: Callable[..., Any], *args: Any, capability: int = 90) -> list[Compiled]:
    """Return the kernels that one call of a launcher would launch."""
    with compiled_launches(capability) as compiled:
        launcher(*args)
    return compiled


def _compile(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Compiled:
    names = {parameter.name for parameter in kernel.params}
    options = {name: value for name, value in kwargs.items() if name not in names}
    values = dict(zip((p.name for p in kernel.params), args, strict=False)) | {
        name: value for name, value in kwargs.items() if name in names
    }
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        kind = "constexpr" if parameter.is_constexpr else _type(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _inspect(kernel.__name__, constants, compiled)


def _type(value: Any) -> str:
    if value is None or (type(value) is int and value == 1):
        return "constexpr"  # Triton's launcher specialises these too
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _inspect(name: str, constants: dict[str, Any], kernel: Any) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, sass = disassemble(cubin, "-res-usage"), disassemble(cubin, "-sass")
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return Compiled(name, constants, registers, stack + local, kernel.metadata.shared, sass)


def disassemble(path: Path, what: str) -> str:
    """Return cuobjdump's output for a cubin or a library: `-res-usage` or `-sass`."""
    done = subprocess.run([TOOLS / "cuobjdump", what, path], check=True, capture_output=True, text=True)
    return done.stdout
