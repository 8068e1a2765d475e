"""Products of FP8 matrices: against float64 of the dequantised operands, and of the operands before the cast."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import BFLOAT16_PRODUCT_ERROR, PRODUCT_ERRORS, assert_equal_to_float64, frobenius_error
from support import WITHOUT_SCHEMA, assert_refused, backends, bad_calls, checked_mode, device_of

from yaongi.kernels import backend as backend_module
from yaongi.kernels import matmul8, matmul8_add, quantize8, use_backend
from yaongi.kernels.matmul8 import op as matmul8_op
from yaongi.kernels.matmul8 import scaled_mm

Tensor = torch.Tensor
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BACKENDS = backends("cuda", "triton")
FORWARD = [(8192, 10240, 2048), (8192, 2048, 4096), (8192, 3072, 2048), (8192, 1024, 2048), (4096 + 8, 2048, 1024)]
GRADIENTS = [(10304, 2048, 8192), (2048, 4096, 8192), (3072, 2048, 8192), (1024, 2048, 16384), (2048, 1024, 4096 + 16)]


def scalar(value: float, device: str = "cpu") -> Tensor:
    return torch.tensor(value, device=device)


def codes(rows: int, columns: int, device: str = "cpu", dtype: torch.dtype = E4M3, positive: bool = False) -> Tensor:
    values = torch.randn(rows, columns, device=device)
    return (values.abs() if positive else values).to(dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double().T


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("addend", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("M", "N", "K"), [(64, 48, 32), (1, 16, 16), (37, 144, 1040), (0, 16, 32), (16, 32, 0)])
def test_matmul8(M: int, N: int, K: int, dtype: torch.dtype, addend: bool, exact: bool, backend: str) -> None:
    """Any number of rows; units that are entries of a vector; both units and the addend count."""
    device = device_of(backend, "matmul8")
    a, b = codes(M, K, device), codes(N, K, device)
    units = torch.tensor([0.0, 0.25, 0.5], device=device)
    more = torch.randn(M, N, device=device, dtype=dtype) if addend else None
    with use_backend(backend, op="matmul8"):  # type: ignore[arg-type]
        out = matmul8(a, b, units[1], units[2], more, dtype=dtype, exact=exact)
    assert out.dtype == dtype
    assert out.is_contiguous()
    wanted = product(a, b) / 8 + (0 if more is None else more.double())
    if wanted.any():
        bound = PRODUCT_ERRORS[exact]["zero mean"] if dtype == torch.float32 else BFLOAT16_PRODUCT_ERROR
        assert frobenius_error(out, wanted) <= max(bound, PRODUCT_ERRORS[exact]["zero mean"])
    else:
        assert not out.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("M", "N", "K"), [(64, 48, 32), (80, 16, 16), (256, 384, 528), (16, 32, 0)])
def test_matmul8_add(M: int, N: int, K: int, backend: str) -> None:
    """Twice into the rows and columns of a wider sum, the rest of which stays."""
    device = device_of(backend, "matmul8_add")
    a, b = codes(M, K, device), codes(N, K, device)
    whole = torch.randn(M + 8, N + 32, device=device)
    before, total = whole.clone(), whole[4:-4, 16:-16]
    with use_backend(backend, op="matmul8_add"):  # type: ignore[arg-type]
        for _ in range(2):
            matmul8_add(a, b, scalar(0.25, device), scalar(0.5, device), total)
    wanted = product(a, b) / 4
    if K:
        assert frobenius_error(total - before[4:-4, 16:-16], wanted) <= PRODUCT_ERRORS[True]["zero mean"]
    total.copy_(before[4:-4, 16:-16])
    assert torch.equal(whole, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_emulation_rounds_once(dtype: torch.dtype) -> None:
    """In the result's own precision, with an addend of another one."""
    a, b, addend = codes(40, 64), codes(48, 64), 1e3 * torch.randn(40, 48, dtype=torch.float64)
    out = matmul8(a, b, scalar(0.5), scalar(4.0), addend, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    wanted = 2 * (a.to(wide) @ b.to(wide).T) + addend.to(wide)
    assert_equal_to_float64(out, wanted.to(dtype), {torch.float64: 1e-15, torch.float32: 1e-6}.get(dtype, 0))


def test_a_product_of_quantised_operands() -> None:
    """Against the product before the casts: 3.75e-2, and a bias of 1.4e-3, for a code at a power of two rounds down."""
    x, w = torch.randn(512, 1024, dtype=torch.float64), torch.randn(256, 1024, dtype=torch.float64)
    (x8, _), (w8, _) = (quantize8(t, scalar(64.0), scalar(0.0)) for t in (x, w))
    out, wanted = matmul8(x8, w8, scalar(1 / 64), scalar(1 / 64), dtype=torch.float64), x @ w.T
    assert 3.5e-2 < frobenius_error(out, wanted) <= 4.0e-2
    assert abs(float(((out - wanted) * wanted.sign()).mean() / wanted.abs().mean())) <= 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", [(E4M3, E5M2), (E5M2, E4M3)], ids=str)
def test_operands_of_two_kinds(kinds: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    device = device_of(backend, "matmul8")
    a, b = codes(64, 128, device, kinds[0]), codes(48, 128, device, kinds[1])
    with use_backend(backend, op="matmul8"):  # type: ignore[arg-type]
        out = matmul8(a, b, scalar(1.0, device), scalar(1.0, device), dtype=torch.float32)
    assert frobenius_error(out, product(a, b)) <= PRODUCT_ERRORS[True]["zero mean"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["a", "b", "unit_a", "unit_b", "addend"])
def test_a_nan_reaches_what_depends_on_it(name: str, backend: str) -> None:
    """Its row, its column, everything, or one element; and nothing else."""
    device = device_of(backend, "matmul8")
    arguments: dict[str, Any] = {"a": codes(40, 64), "b": codes(48, 64), "addend": torch.randn(40, 48).bfloat16()}
    arguments |= {"unit_a": scalar(1.0), "unit_b": scalar(1.0)}
    wanted = torch.zeros(40, 48, dtype=torch.bool)
    lost = {"a": (3, ...), "b": (..., 5), "addend": (3, 5)}.get(name, ...)
    wanted[lost] = True
    arguments[name][{"a": (3, 7), "b": (5, 7), "addend": (3, 5)}.get(name, ())] = torch.nan
    with use_backend(backend, op="matmul8"):  # type: ignore[arg-type]
        out = matmul8(**{name: value.to(device) for name, value in arguments.items()})
    assert torch.equal(out.isnan().cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("sign", ["zero mean", "one sign"])
@pytest.mark.parametrize("shape", FORWARD + GRADIENTS, ids=str)
def test_flagship_shapes(shape: tuple[int, int, int], sign: str, exact: bool, backend: str) -> None:
    """Rounded to bfloat16 with an addend, and added to a float32 sum; the same bits in two runs."""
    M, N, K = shape
    a, b = (codes(rows, K, "cuda", positive=sign == "one sign") for rows in (M, N))
    units = scalar(2.0**-7, "cuda"), scalar(2.0**-6, "cuda")
    some = torch.arange(0, M, 61, device="cuda")
    wanted = product(a[some], b) / 2**13
    addend = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
    with use_backend(backend):  # type: ignore[arg-type]
        rounded = [matmul8(a, b, *units, addend, exact=exact) for _ in range(2)]
        sums = [torch.zeros(M, N, device="cuda") for _ in range(2)]
        for total in sums:
            matmul8_add(a, b, *units, total, exact=exact)
    bound = PRODUCT_ERRORS[exact][sign]
    assert frobenius_error(sums[0][some], wanted) <= bound
    assert frobenius_error(rounded[0][some], wanted + addend[some]) <= max(bound, BFLOAT16_PRODUCT_ERROR)
    assert torch.equal(*sums)
    assert torch.equal(*rounded)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_rows_of_wider_tensors_and_odd_places(backend: str) -> None:
    """Operands, addend and sum read and written in place, 16 bytes past an alignment of 256."""
    wide_a, wide_b = codes(66, 272, "cuda"), codes(96, 272, "cuda")
    a, b = wide_a[1:65, 16:144], wide_b[:48, 16:144]
    addend = torch.randn(64, 48 + 8, device="cuda", dtype=torch.bfloat16)[:, 8:]
    one = scalar(1.0, "cuda")
    with use_backend(backend):  # type: ignore[arg-type]
        out = matmul8(a, b, one, one, addend)
        wide = torch.ones(64, 48 + 8, device="cuda")
        matmul8_add(a, b, one, one, wide[:, 4:-4])
    assert frobenius_error(out, product(a, b) + addend.double()) <= BFLOAT16_PRODUCT_ERROR
    assert frobenius_error(wide[:, 4:-4] - 1, product(a, b)) <= PRODUCT_ERRORS[True]["zero mean"]
    assert (wide[:, :4] == 1).all()
    assert (wide[:, -4:] == 1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [False, True])
def test_capture_and_replay(warm: bool) -> None:
    """A replay reads units where they are; a workspace that a recording made is not kept for later calls."""
    a, b, units = codes(256, 512, "cuda"), codes(128, 512, "cuda"), torch.tensor([0.0, 0.5, 0.25], device="cuda")
    total, stream = torch.zeros(256, 128, device="cuda"), torch.cuda.Stream()
    matmul8(a, b, units[1], units[2])
    matmul8_op._workspaces.pop((0, stream.cuda_stream), None)  # streams are reused
    stream.wait_stream(torch.cuda.current_stream())
    if warm:
        with torch.cuda.stream(stream):
            matmul8_add(a, b, units[1], units[2], total)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = matmul8(a, b, units[1], units[2])
        matmul8_add(a, b, units[1], units[2], total)
    assert ((0, stream.cuda_stream) in matmul8_op._workspaces) == warm
    total.zero_()
    for i in range(3):
        units.fill_(2.0**i)
        graph.replay()
    assert frobenius_error(out, 16 * product(a, b)) <= BFLOAT16_PRODUCT_ERROR
    assert frobenius_error(total, 21 * product(a, b)) <= PRODUCT_ERRORS[True]["zero mean"]


@pytest.mark.gpu
def test_many_shapes_and_two_streams() -> None:
    """More shapes than plans are kept for, and calls that run at the same time in workspaces of their own."""
    a, b, one = codes(1024, 2048, "cuda"), codes(512, 2048, "cuda"), scalar(1.0, "cuda")
    expected = matmul8(a, b, one, one)
    for rows in range(1, 1025):
        out = matmul8(a[:rows], b, one, one)
    assert frobenius_error(out, product(a, b)) <= BFLOAT16_PRODUCT_ERROR
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(matmul8(a, b, one, one))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.gpu
def test_the_chosen_backend_is_cublaslt() -> None:
    """On an H100 with `_C.so`: no silent fallback."""
    a, b, one = codes(64, 128, "cuda"), codes(48, 128, "cuda"), scalar(1.0, "cuda")
    op = backend_module.OPS["matmul8"]
    assert op.pick((a, b, one, one, None, torch.bfloat16, True)) == "cuda"
    assert torch.ops.yaongi_cuda.cublaslt_version() >= 120_000


def test_a_unit_is_copied_only_where_it_must_be() -> None:
    """cuBLASLt reads it at a multiple of 16 bytes."""
    vector = torch.arange(8.0)
    for i in range(8):
        aligned = scaled_mm.aligned_unit(vector[i])
        assert aligned == i
        assert aligned.data_ptr() % 16 == 0
        assert (aligned.data_ptr() == vector[i].data_ptr()) == (i % 4 == 0)


def test_a_torch_without_cublaslt_says_so() -> None:
    arguments = codes(16, 16), codes(16, 16), scalar(1.0), scalar(1.0), None, torch.bfloat16, True
    with mock.patch.object(matmul8_op, "_cublaslt_missing", return_value="torch has no libcublasLt.so.13"):
        assert backend_module.OPS["matmul8"].refuses["cuda"](*arguments) == "torch has no libcublasLt.so.13"


def test_what_cublaslt_does_not_take_is_said() -> None:
    a, b, one = codes(16, 16), codes(16, 16), scalar(1.0)
    refuses = backend_module.OPS["matmul8"].refuses["cuda"]
    with mock.patch.object(matmul8_op, "_cublaslt_missing", return_value=None):
        assert refuses(a, b, one, one, None, torch.bfloat16, True) is None
        assert refuses(a, b, one, one, None, torch.float64, True) == "its results are bfloat16 or float32, got float64"
        addend = torch.ones(16, 16)
        wanted = "it takes an addend in the result's dtype, got float32"
        assert refuses(a, b, one, one, addend, torch.bfloat16, True) == wanted
        a, b = (codes(16, 16, dtype=E5M2) for _ in range(2))
        wanted = "it takes at most one operand in float8_e5m2, got two"
        assert refuses(a, b, one, one, None, torch.bfloat16, True) == wanted


@pytest.mark.parametrize("addend", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [(40, 48, 64), (0, 16, 32), (16, 32, 0)])
def test_scaled_mm_is_called_rightly(M: int, N: int, K: int, addend: bool) -> None:
    """Torch's own product runs on the CPU too."""
    a, b, units = codes(M, K), codes(N, K), (scalar(0.5), scalar(0.25))
    more = torch.randn(M, N).bfloat16() if addend else None
    out = scaled_mm.matmul8_scaled_mm(a, b, *units, more, torch.bfloat16, True)
    assert_equal_to_float64(out, matmul8(a, b, *units, more), 1e-2)
    total, wanted = torch.ones(M, N), torch.ones(M, N)
    scaled_mm.matmul8_add_scaled_mm(a, b, *units, total, True)
    matmul8_add(a, b, *units, wanted)
    assert_equal_to_float64(total, wanted, 1e-5)


def test_opcheck() -> None:
    ops, a, b, one = torch.ops.yaongi, codes(32, 48), codes(16, 48), scalar(1.0)
    for addend in (None, torch.randn(32, 16)):
        arguments = (a, b, one, one, addend, torch.bfloat16, True)
        torch.library.opcheck(ops.matmul8.default, arguments, test_utils=WITHOUT_SCHEMA)
    arguments = (a, b, one, one, torch.randn(32, 16), True)
    torch.library.opcheck(ops.matmul8_add.default, arguments, test_utils=WITHOUT_SCHEMA)


GOOD = {"a": codes(4, 32), "b": codes(16, 32), "unit_a": scalar(1.0), "unit_b": scalar(1.0), "addend": None}
OPERAND = "in float8_e4m3fn or float8_e5m2 with"


def bad_arguments() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    yield {"a": 1.0}, TypeError, "a must be a tensor, got float"
    yield (
        {"a": torch.ones(8192, 2040, dtype=torch.bfloat16)},
        TypeError,
        f"a must be (M, K) {OPERAND} K % 16 == 0, got (8192, 2040) bfloat16",
    )
    yield {"a": codes(4, 40)}, ValueError, f"a must be (M, K) {OPERAND} K % 16 == 0, got (4, 40) float8_e4m3fn"
    yield {"a": codes(4, 32).view(-1)}, ValueError, f"a must be (M, K) {OPERAND} K % 16 == 0, got (128,) float8_e4m3fn"
    yield (
        {"b": codes(17, 32)},
        ValueError,
        f"b must be (N, K) {OPERAND} N % 16 == K % 16 == 0, got (17, 32) float8_e4m3fn",
    )
    yield {"b": codes(16, 48)}, ValueError, "b must be (N, K) = (N, 32), got (16, 48)"
    yield {"b": codes(32, 16).mT}, ValueError, "b must have stride 1 along K, got strides (1, 16)"
    yield {"unit_a": torch.ones(4)}, ValueError, "unit_a must be (), got (4,)"
    yield {"unit_b": 1.0}, TypeError, "unit_b must be a tensor, got float"
    yield {"addend": torch.ones(4, 15)}, ValueError, "addend must be (M, N) = (4, 16), got (4, 15)"
    yield (
        {"dtype": torch.int32},
        ValueError,
        ("dtype must be torch.float16 or torch.bfloat16 or torch.float32 or torch.float64, got torch.int32"),
    )
    yield {"exact": 1}, TypeError, "exact must be a bool, got int"


@bad_calls(bad_arguments())
def test_bad_arguments(bad: Any) -> None:
    assert_refused(matmul8, GOOD, bad)


@bad_calls(
    [
        ({"total": torch.ones(4, 16).bfloat16()}, TypeError, "total must be float32 or float64, got bfloat16"),
        ({"total": torch.ones(4, 15)}, ValueError, "total must be (M, N) = (4, 16), got (4, 15)"),
        (
            {"total": torch.ones(1, 16).expand(4, 16)},
            ValueError,
            "total must not be expanded, for it is written, got strides (0, 1)",
        ),
        ({"a": codes(4, 40)}, ValueError, f"a must be (M, K) {OPERAND} K % 16 == 0, got (4, 40) float8_e4m3fn"),
    ]
)
def test_bad_sums(bad: Any) -> None:
    good = {name: value for name, value in GOOD.items() if name != "addend"} | {"total": torch.ones(4, 16)}
    assert_refused(matmul8_add, good, bad)


def test_checked_mode() -> None:
    bad = GOOD | {"a": torch.full((4, 32), torch.nan).to(E4M3)}
    with checked_mode(), pytest.raises(ValueError, match=r"^matmul8: a must be finite, got 128 non-finite values$"):
        matmul8(**bad)
