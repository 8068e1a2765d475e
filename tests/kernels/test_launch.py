"""Launches are what Triton's would be: the same compiled kernel with the same arguments, seen by the same hooks.

Triton itself, as installed, finds the kernel of each launch anew; only its compiler, its driver and the launcher in C
are stand-ins here.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from yaongi.kernels.common import launch
from yaongi.kernels.common.descriptors import descriptor

pytestmark = pytest.mark.skipif(not launch.DIRECT, reason="this Triton's own launches are used")
Tensor = torch.Tensor
MAP = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "fp4_padded": False}
CONSTANTS_AT = slice(-2, None)  # compiled in, so the launcher in C skips what it gets
HOOKS = slice(10, 13)  # among what a launcher in C takes: metadata and callables for hooks, of which there are none


@triton.jit
def _plain_kernel(p, q, r, s, A: tl.constexpr, B: tl.constexpr = 5):
    pass


@triton.jit(do_not_specialize=["r"], do_not_specialize_on_alignment=["p"])
def _loose_kernel(p, q, r, s, A: tl.constexpr, B: tl.constexpr = 5):
    pass


@triton.jit
def _scale_kernel(x_ptr, y_ptr, addend_ptr, n, factor, HAS_ADDEND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + i, mask=i < n, other=0.0) * factor
    if HAS_ADDEND:
        y += tl.load(addend_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def _copy_kernel(x_desc, y_desc, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = [tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS]
    y_desc.store(at, x_desc.load(at))


class Machine:
    """Two GPUs that only note which compiled kernel is launched, with which arguments."""

    def __init__(self, maps: bool = True) -> None:
        self.device, self.maps, self.scratch, self.compiled = 0, maps, 0, 0
        self.launched: list[tuple[int, list[Any]]] = []
        self.utils = SimpleNamespace(fill_tma_descriptor=lambda *args: ("map", *map(repr, args)))

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def compile(self, kernel: Any, key: str, signature: Any, device: int, constants: Any, options: Any, *_: Any) -> Any:
        """Stand in for Triton's compiler: remember a new kernel as its cache does."""
        self.compiled += 1
        number, boxes = self.compiled, [s for s in signature.values() if str(s).startswith("tensordesc")]
        maps = [{**MAP, "block_size": box} for box in boxes] if self.maps else []
        run: Any = CudaLauncher.__new__(CudaLauncher)
        run.launch = wrap_handle_tensordesc(
            lambda *args: self.launched.append((number, [as_address(a) for a in args])), signature, maps
        )
        run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, False, options.launch_pdl
        run.global_scratch_size, run.profile_scratch_size = self.scratch, 0
        run.global_scratch_align = run.profile_scratch_align = 1
        made = SimpleNamespace(
            run=run,
            function=1000 + number,
            packed_metadata=(options.num_warps, 1, 0),
            metadata=SimpleNamespace(tensordesc_meta=maps),
            launch_metadata=lambda *args: None,
        )
        kernel.device_caches[device][0][key] = made
        return made


def as_address(argument: Any) -> Any:
    return argument.data_ptr() if hasattr(argument, "data_ptr") else argument


class on:
    """Let Triton and the launcher find a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.patches = [
            mock.patch.object(triton.runtime.driver, "_active", machine),
            mock.patch.object(JITFunction, "_do_compile", lambda kernel, *args: machine.compile(kernel, *args)),
            mock.patch.dict(launch._remembered, clear=True),
            *(mock.patch.dict(kernel.device_caches, clear=True) for kernel in (_plain_kernel, _loose_kernel)),
        ]

    def __enter__(self) -> Machine:
        for patch in self.patches:
            patch.start()
        return self.machine

    def __exit__(self, *_: object) -> None:
        for patch in reversed(self.patches):
            patch.stop()


MEMORY = torch.zeros(4096, dtype=torch.uint8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8, torch.float8_e4m3fn)


def tensor_at(dtype: torch.dtype, place: int) -> Tensor:
    """A tensor of 16 elements that starts `place` elements behind a multiple of 16 bytes."""
    first = -MEMORY.data_ptr() % 16 + place * dtype.itemsize
    aligned = MEMORY[-MEMORY.data_ptr() % 16 :][:2048].view(dtype)
    assert aligned[place:].data_ptr() == MEMORY.data_ptr() + first
    return aligned[place : place + 16]


def described(dtype: torch.dtype, rows: int, box: tuple[int, int]) -> TensorDescriptor:
    return descriptor(tensor_at(dtype, 0).new_empty(rows, 64), *box)


POINTERS = st.builds(tensor_at, st.sampled_from(DTYPES), st.integers(0, 17))
PARAMETERS = POINTERS.map(lambda t: torch.nn.Parameter(t, requires_grad=False))
INTEGERS = st.sampled_from(
    [0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 16, 2**40]
)
NUMBERS = st.sampled_from([0.0, 1.0, -0.5, float("inf"), float("nan"), 1e300])
DESCRIPTORS = st.builds(
    described,
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.sampled_from([1, 8, 24]),
    st.sampled_from([(16, 64), (32, 16)]),
)
ARGUMENTS = st.one_of(POINTERS, PARAMETERS, INTEGERS, NUMBERS, st.none(), st.booleans(), DESCRIPTORS)
CONSTANTS = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 64), st.sampled_from([0.5, 1.0, tl.float32, tl.bfloat16, "a"])
)
OPTIONS = st.fixed_dictionaries(
    {"A": CONSTANTS},
    optional={
        "B": CONSTANTS,
        "num_warps": st.sampled_from([1, 2, 4]),
        "num_stages": st.integers(1, 3),
        "launch_pdl": st.booleans(),
    },
)
KERNELS, GRIDS = st.sampled_from([_plain_kernel, _loose_kernel]), st.sampled_from([(1,), (3, 2), (4, 5, 6)])
LAUNCHES = st.tuples(KERNELS, GRIDS, st.tuples(*[ARGUMENTS] * 4), OPTIONS)
PLACES = st.integers(0, 3)


def neighbours(launch_: Any, first: int, second: int, argument: Any, named: Any) -> list[Any]:
    """A launch, and others that differ from it in one respect."""
    kernel, grid, args, names = launch_
    changed, swapped = list(args), list(args)
    changed[first] = argument
    swapped[first], swapped[second] = args[second], args[first]
    return [launch_, (kernel, grid, changed, names), (kernel, grid, swapped, names), (kernel, grid, args, named)]


def same(a: Any, b: Any) -> bool:
    """Whether two lists of a launcher's arguments are equal, NaN being equal to itself."""
    return repr([type(v).__name__ for v in a]) == repr([type(v).__name__ for v in b]) and repr(a) == repr(b)


@settings(max_examples=200, deadline=None)
@given(
    few=st.lists(LAUNCHES, min_size=1, max_size=3),
    order=st.lists(st.tuples(PLACES, PLACES, PLACES, ARGUMENTS, OPTIONS, st.integers(0, 1), st.booleans()), max_size=8),
    maps=st.booleans(),
)
def test_every_launch_is_tritons(few: list[Any], order: list[Any], maps: bool) -> None:
    """Whatever came before, on either GPU, each launch does what `kernel[grid]` does."""
    with on(Machine(maps)) as machine:
        for which, first, second, argument, options, machine.device, debug in order:
            for kernel, grid, args, named in neighbours(few[which % len(few)], first, second, argument, options):
                with mock.patch.object(triton.knobs.runtime, "debug", debug):
                    launch.launcher(kernel, grid)(*args, **named)
                    kernel[grid](*args, **named)
                (mine, ours), (its, tritons) = machine.launched[-2:]
                assert mine == its
                for arguments in (ours, tritons):
                    del arguments[HOOKS], arguments[CONSTANTS_AT]
                assert same(ours, tritons)


def scale(x: Tensor, n: int = 8, factor: float = 2.0) -> None:
    launch.launcher(_plain_kernel, (3,))(x, n, factor, None, A=True, num_warps=2)


@pytest.fixture
def tritons() -> Iterator[list[str]]:
    """The names of the kernels whose launches have gone through Triton, on a machine that isn't there."""
    names: list[str] = []
    run = JITFunction.run

    def noted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(kernel.__name__)
        return run(kernel, *args, **kwargs)

    with on(Machine()), mock.patch.object(JITFunction, "run", noted):
        yield names


def test_a_launch_like_an_earlier_one_skips_triton(tritons: list[str]) -> None:
    """Its tensors and fractions may be others."""
    scale(tensor_at(torch.float32, 0))
    scale(tensor_at(torch.float32, 4), factor=3.0)
    assert len(tritons) == 1
    scale(tensor_at(torch.float32, 4), n=9)
    assert len(tritons) == 2


@pytest.mark.parametrize("place", ["launch_enter_hook", "launch_exit_hook", "kernel"])
def test_hooks_see_every_launch(place: str, tritons: list[str]) -> None:
    """A profiler's, and those of a kernel."""
    x, knobs = tensor_at(torch.float32, 0), triton.knobs.runtime
    hooks = _plain_kernel.pre_run_hooks if place == "kernel" else getattr(knobs, place).calls
    scale(x)
    hooks.append(lambda *args, **kwargs: None)
    try:
        scale(x)
        assert len(tritons) == 2
    finally:
        hooks.pop()
    scale(x)
    assert len(tritons) == 2


def test_scratch_memory_is_tritons_to_give() -> None:
    """A kernel that needs some is launched by Triton each time."""
    with on(Machine()) as machine, mock.patch.object(CudaLauncher, "__call__") as called:
        machine.scratch = 16
        for _ in range(3):
            scale(tensor_at(torch.float32, 0))
    assert called.call_count == 3


def test_few_launches_are_kept(tritons: list[str]) -> None:
    """However many shapes come, memory is bounded."""
    with mock.patch.object(launch, "REMEMBERED", 3):
        for n in range(2, 9):
            scale(tensor_at(torch.float32, 0), n=n)
            assert len(launch._remembered) <= 3


def test_numbers_by_name_and_constants_by_place_are_refused(tritons: list[str]) -> None:
    """The former would be taken for constants, and fractions among the latter not be compared."""
    x = tensor_at(torch.float32, 0)
    with pytest.raises(TypeError, match="launcher: s of _plain_kernel must be given by place"):
        launch.launcher(_plain_kernel, (1,))(x, x, 1, s=2.0, A=1)
    with pytest.raises(TypeError, match="launcher: A of _plain_kernel must be given by name"):
        launch.launcher(_plain_kernel, (1,))(x, x, 1, 2.0, 0.5)


def test_every_kernel_is_launched_so() -> None:
    files = [path for path in Path(launch.__file__).parents[1].rglob("*.py") if path.name != "launch.py"]
    assert len(files) > 50
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert not ast.unparse(node.func.value).endswith("_kernel"), f"{path}:{node.lineno}"


@pytest.mark.gpu
def test_numbers_on_a_gpu() -> None:
    """Again and again, with other tensors, dtypes, alignments, sizes and addends."""
    wide = torch.randn(42, device="cuda")
    for _ in range(3):
        for x in (wide[:40], wide[:41].half(), wide[1:]):
            for addend in (None, torch.randn_like(x)):
                for factor in (2.0, -0.5):
                    y, n = torch.empty_like(x), len(x)
                    with_addend = {"HAS_ADDEND": addend is not None, "BLOCK": 16}
                    launch.launcher(_scale_kernel, (3,))(x, y, addend, n, factor, **with_addend)
                    wanted = x.float() * factor + (0 if addend is None else addend.float())
                    torch.testing.assert_close(y, wanted.to(x.dtype), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_descriptors_on_a_gpu() -> None:
    """Each call reads and writes its own tensors, of any shape, where an address has been another tensor's."""
    for dtype in (torch.bfloat16, torch.float16) * 2:
        for rows, columns in ((64, 64), (40, 128), (200, 64)):
            x = torch.randn(rows, columns, device="cuda", dtype=dtype)
            y = torch.zeros_like(x)
            boxes = (descriptor(x, 32, 64), descriptor(y, 32, 64))
            launch.launcher(_copy_kernel, (-(-rows // 32), columns // 64))(*boxes, ROWS=32, COLUMNS=64)
            assert torch.equal(x, y)
            del x, y
