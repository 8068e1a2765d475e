"""Compile the FP8 kernels without a GPU: hardware casts, wide accesses, one atomic, no spills; they fit every GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from aot import POINTERS, compile_launcher
from test_triton_aot import meta
from test_triton_generations import SHARED, SPILLED

from yaongi.kernels.fp8_quantize import byte_transpose, row_casts, weight_casts
from yaongi.kernels.moe.dispatch import Dispatch
from yaongi.kernels.moe.experts_backward import moe_dh
from yaongi.kernels.moe.experts_forward import moe_up
from yaongi.kernels.moe.grouped_gemm import Fp8, moe_grouped_gemm
from yaongi.kernels.rms_norm import fp8_norm

FLOAT, E4M3 = torch.float32, torch.float8_e4m3fn
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT])
POINTERS[E4M3] = "*fp8e4nv"
CAST, ATOMIC = "SATFINITE.E4M3", "REDG.E.MAX.S32"


def scalar() -> torch.Tensor:
    return meta(dtype=FLOAT)


@DTYPES
def test_row_casts(dtype: torch.dtype) -> None:
    T, D = 8192, 3072
    x, a8 = meta(T, D + 16, dtype=dtype)[:, :D], meta(T, D, dtype=E4M3)
    kernels = compile_launcher(row_casts.quantize8_triton, x, scalar(), scalar(), True, True)
    kernels += compile_launcher(row_casts.squared_relu8_triton, x, scalar(), scalar())
    kernels += compile_launcher(row_casts.squared_relu8_backward_triton, x, a8, scalar(), scalar(), scalar())
    names = ["_quantize8_kernel", "_squared_relu8_kernel", "_squared_relu8_backward_kernel"]
    assert [kernel.name for kernel in kernels] == [n for name in names for n in (name, "_transpose8_kernel")]
    for kernel in kernels:
        assert kernel.spilled_bytes == 0, kernel.name
        assert kernel.registers <= 80, kernel.name
        assert "LDG.E.128" in kernel.sass, kernel.name
        if kernel.name != "_transpose8_kernel":
            assert CAST in kernel.sass, kernel.name
            assert kernel.sass.count(ATOMIC) == 1, kernel.name


def test_transpose8() -> None:
    """16 bytes at a time in both orders; between threads go words, not bytes."""
    for shape in ((8192, 2048), (64, 512, 2048)):
        (kernel,) = compile_launcher(byte_transpose.transpose8_triton, meta(*shape, dtype=E4M3))
        assert kernel.spilled_bytes == 0
        assert kernel.registers <= 80
        assert kernel.sass.count("LDG.E.128") == kernel.sass.count("STG.E.128") == 8
        assert "LDS.U8" not in kernel.sass
        assert "STS.U8" not in kernel.sass


@DTYPES
def test_weights(dtype: torch.dtype) -> None:
    kernels = compile_launcher(weight_casts.quantize_weight8_triton, meta(64, 512, 2048, dtype=dtype))
    assert [kernel.name for kernel in kernels] == ["_weight8_amax_kernel", "_weight8_cast_kernel", "_transpose8_kernel"]
    amax, cast, _ = kernels
    assert amax.sass.count(ATOMIC) == 1
    assert CAST in cast.sass
    for kernel in kernels:
        assert kernel.spilled_bytes == 0, kernel.name
        assert "LDG.E.128" in kernel.sass, kernel.name


@DTYPES
@pytest.mark.parametrize("width", [768, 2048, 2688])
def test_rms_norm8(width: int, dtype: torch.dtype) -> None:
    x, weight, r = meta(8192, width, dtype=dtype), meta(width, dtype=dtype), meta(8192, dtype=FLOAT)
    kernels = compile_launcher(fp8_norm.rms_norm8_triton, x, weight, 1e-5, scalar(), scalar(), True)
    scales = (scalar(), scalar(), scalar())
    kernels += compile_launcher(fp8_norm.rms_norm8_backward_triton, x, x, x, weight, r, *scales)
    forward, backward, *_ = kernels
    assert (forward.name, backward.name) == ("_norm8_kernel", "_norm8_backward_kernel")
    assert forward.registers <= 128
    assert backward.registers <= 168  # four programs of four warps fit on a multiprocessor at 128
    for kernel in (forward, backward):
        assert kernel.spilled_bytes <= (0 if dtype == torch.bfloat16 else 16), kernel.name
        assert CAST in kernel.sass, kernel.name
        assert kernel.sass.count(ATOMIC) == 1, kernel.name
        assert "LDG.E.128" in kernel.sass or "LDG.E.64" in kernel.sass, kernel.name


def moe8_stages(D: int, F: int) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """The four products of the experts in FP8 at the flagship's number of tokens and experts."""
    T, E, pairs = 8192, 64, 6 * 8192
    order, token, row = (meta(pairs, dtype=torch.int32) for _ in range(3))
    plan = Dispatch(order, token, row, meta(E + 1, dtype=torch.int32), meta(E, dtype=torch.int32), pairs // 128 + E)
    x8, a8, weights = meta(T, D, dtype=E4M3), meta(pairs, F, dtype=E4M3), meta(pairs, dtype=FLOAT)
    up8, down8 = meta(E, F, D, dtype=E4M3), meta(E, D, F, dtype=E4M3)  # each is the shape of the other, transposed
    fp8 = Fp8(scalar(), scalar(), torch.bfloat16, scalar(), scalar(), scalar())
    yield "up", moe_up, (x8, up8, plan, fp8)
    yield "down", moe_grouped_gemm, (a8, down8, plan, weights, fp8)
    yield "dh", moe_dh, (x8, up8, a8, plan, weights, fp8)
    yield "dx", moe_grouped_gemm, (a8, down8, plan, None, fp8)


@pytest.mark.parametrize(
    ("D", "F"),
    [(2048, 512), *(pytest.param(*size, marks=pytest.mark.long) for size in ((2048, 256), (2048, 1024), (2688, 1856)))],
)
def test_moe8(D: int, F: int) -> None:
    """FP8 on tensor cores from TMA tiles, casts of the accumulator with an atomic per panel, nothing spilled."""
    for stage, launcher, arguments in moe8_stages(D, F):
        kernel = compile_launcher(launcher, *arguments)[0]
        assert kernel.spilled_bytes == 0, stage
        assert "QGMMA.64x" in kernel.sass, stage
        assert "UTMALDG" in kernel.sass, stage
        assert "HGMMA" not in kernel.sass, stage
        assert "STG.E.128" in kernel.sass, stage
        assert kernel.sass.count(ATOMIC) == {"up": 1, "dh": 4}.get(stage, 0), stage
        assert (CAST in kernel.sass) == (stage in ("up", "dh")), stage


def experts() -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    yield from ((launcher, arguments) for _, launcher, arguments in moe8_stages(2048, 512))


def casts() -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    wide, a8 = meta(8192, 2048), meta(8192, 2048, dtype=E4M3)
    yield row_casts.quantize8_triton, (wide, scalar(), scalar(), True, False)
    yield row_casts.squared_relu8_triton, (wide, scalar(), scalar())
    yield row_casts.squared_relu8_backward_triton, (wide, a8, scalar(), scalar(), scalar())
    yield weight_casts.quantize_weight8_triton, (meta(64, 512, 2048, dtype=FLOAT),)
    yield fp8_norm.rms_norm8_triton, (wide, meta(2048), 1e-5, scalar(), scalar(), False)
    rows = meta(8192, dtype=FLOAT)
    yield fp8_norm.rms_norm8_backward_triton, (wide, None, wide, meta(2048), rows, scalar(), scalar(), scalar())


def bytes_alone() -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    yield byte_transpose.transpose8_triton, (meta(8192, 2048, dtype=E4M3),)


# GPUs before compute capability 8.9 have no cast to FP8: they take the references.
LAUNCHES = [(capability, bytes_alone) for capability in SHARED]
NEWER = [capability for capability in SHARED if capability >= 89 and capability != 90]
LAUNCHES += [(capability, casts) for capability in NEWER]
LAUNCHES += [pytest.param(capability, experts, marks=pytest.mark.long) for capability in NEWER]


@pytest.mark.parametrize(("capability", "launches"), LAUNCHES, ids=lambda f: getattr(f, "__name__", f))
def test_every_generation(capability: int, launches: Callable[[], Iterator[Any]]) -> None:
    for launcher, arguments in launches():
        for kernel in compile_launcher(launcher, *arguments, capability=capability):
            assert kernel.shared_bytes <= SHARED[capability] * 1024, kernel.name
            assert kernel.spilled_bytes <= SPILLED, kernel.name
