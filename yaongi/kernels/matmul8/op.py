"""`matmul8` and `matmul8_add`: registration, the launch of cuBLASLt, and the public functions."""

import functools

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.fp8_quantize.op import FLOAT8, SCALAR, refuses_gpu
from yaongi.kernels.matmul8.reference import matmul8_add_reference, matmul8_reference
from yaongi.kernels.matmul8.scaled_mm import aligned_unit

Tensor = torch.Tensor
WORKSPACE_BYTES = 32 << 20  # what cuBLASLt may use for one call on Hopper
_workspaces: dict[tuple[int, int], Tensor] = {}  # by device and stream


def _matmul8_cuda(
    a: Tensor,
    b: Tensor,
    unit_a: Tensor,
    unit_b: Tensor,
    addend: Tensor | None,
    dtype: torch.dtype,
    exact: bool,
) -> Tensor:
    if not (a.numel() and b.numel()):
        return matmul8_reference(a, b, unit_a, unit_b, addend, dtype, exact)
    out = a.new_empty(a.shape[0], b.shape[0], dtype=dtype)
    units = aligned_unit(unit_a), aligned_unit(unit_b)
    backend.cuda_launcher("matmul8")(a, b, *units, addend, out, exact, _workspace(a.get_device()))
    return out


def _matmul8_add_cuda(a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, total: Tensor, exact: bool) -> None:
    if a.numel() and b.numel():
        units = aligned_unit(unit_a), aligned_unit(unit_b)
        backend.cuda_launcher("matmul8")(a, b, *units, total, total, exact, _workspace(a.get_device()))


def _workspace(device: int) -> Tensor:
    """Return the workspace of the current stream; a graph being recorded gets one from its own memory."""
    key = device, torch._C._cuda_getCurrentRawStream(device)
    if key in _workspaces:
        return _workspaces[key]
    made = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")
    if not torch.cuda.is_current_stream_capturing():
        _workspaces[key] = made
    return made


@functools.cache
def _cublaslt_missing() -> str | None:
    """Return why cuBLASLt can't be called, or None if it can; `_C.so` is loaded."""
    found = torch.ops.yaongi_cuda.cublaslt_version()
    return None if found else "torch has no libcublasLt.so.13"


def _refuses_operands(a: Tensor, b: Tensor) -> str | None:
    both = a.dtype == b.dtype == torch.float8_e5m2
    return "it takes at most one operand in float8_e5m2, got two" if both else None


def _cuda_refuses(
    a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, addend: Tensor | None, dtype: torch.dtype, exact: bool
) -> str | None:
    missing = _cublaslt_missing() or _refuses_operands(a, b)
    if missing:
        return missing
    if dtype not in (torch.bfloat16, torch.float32):
        return f"its results are bfloat16 or float32, got {str(dtype).removeprefix('torch.')}"
    if addend is not None and addend.dtype != dtype:
        return f"it takes an addend in the result's dtype, got {str(addend.dtype).removeprefix('torch.')}"
    return None


def _add_cuda_refuses(a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, total: Tensor, exact: bool) -> str | None:
    return _cuda_refuses(a, b, unit_a, unit_b, total, total.dtype, exact)


def _triton_refuses(a: Tensor, b: Tensor, *rest: object) -> str | None:
    wide = torch.float64 in rest or any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in rest)
    return refuses_gpu(a.device) or _refuses_operands(a, b) or ("it takes no float64" if wide else None)


def _fake(
    a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, addend: Tensor | None, dtype: torch.dtype, exact: bool
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def _add_fake(a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, total: Tensor, exact: bool) -> None:
    return None


def _value_check(a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, addend: Tensor | None, *rest: object) -> None:
    check.finite("matmul8", a=a, b=b, unit_a=unit_a, unit_b=unit_b, addend=addend)


def _add_value_check(a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, total: Tensor, exact: bool) -> None:
    check.finite("matmul8_add", a=a, b=b, unit_a=unit_a, unit_b=unit_b, total=total)


_op = backend.define(
    "matmul8(Tensor a, Tensor b, Tensor unit_a, Tensor unit_b, Tensor? addend, ScalarType dtype, bool exact) -> Tensor",
    reference=matmul8_reference,
    fake=_fake,
    triton="yaongi.kernels.matmul8.scaled_mm:matmul8_scaled_mm",
    triton_refuses=_triton_refuses,
    cuda=_matmul8_cuda,
    cuda_refuses=_cuda_refuses,
    value_check=_value_check,
)
_add_op = backend.define(
    "matmul8_add(Tensor a, Tensor b, Tensor unit_a, Tensor unit_b, Tensor(a!) total, bool exact) -> ()",
    reference=matmul8_add_reference,
    fake=_add_fake,
    triton="yaongi.kernels.matmul8.scaled_mm:matmul8_add_scaled_mm",
    triton_refuses=_triton_refuses,
    cuda=_matmul8_add_cuda,
    cuda_refuses=_add_cuda_refuses,
    value_check=_add_value_check,
)
backend.define_no_autograd("matmul8")


def matmul8(
    a: Tensor,
    b: Tensor,
    unit_a: Tensor,
    unit_b: Tensor,
    addend: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    exact: bool = True,
) -> Tensor:
    """Return a·bᵀ·unit_a·unit_b + addend.

    Args:
        a: (M, K), float8_e4m3fn or float8_e5m2, unit stride along K; K a multiple of 16.
        b: (N, K), like a; N a multiple of 16.
        unit_a, unit_b: (), float32, what one step of a's and b's codes stands for.
        addend: (M, N), any float, unit stride along N: added before the result is rounded.
        dtype: of the result: bfloat16, float16, float32 or float64.
        exact: on Hopper, promote the tensor cores' sums, of 13 bits, to float32 every 128 of K; else only at the end.

    Returns:
        (M, N) in `dtype`, contiguous; accumulated in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape or stride.
    """
    args = check.Arguments("matmul8")
    _check_operands(args, a, b, unit_a, unit_b)
    if addend is not None:
        args.tensor("addend", addend, ("M", "N"), unit_stride=True)
    args.choice("dtype", dtype, check.FLOAT_DTYPES)
    args.boolean("exact", exact)
    return _op(a, b, unit_a, unit_b, addend, dtype, exact)


def matmul8_add(a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, total: Tensor, *, exact: bool = True) -> None:
    """Do total += a·bᵀ·unit_a·unit_b, in place.

    Args:
        a, b, unit_a, unit_b, exact: as for `matmul8`.
        total: (M, N), float32 or float64, unit stride along N.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape or stride.
    """
    args = check.Arguments("matmul8_add")
    _check_operands(args, a, b, unit_a, unit_b)
    args.tensor("total", total, ("M", "N"), (torch.float32, torch.float64), unit_stride=True, written=True)
    args.boolean("exact", exact)
    _add_op(a, b, unit_a, unit_b, total, exact)


def _check_operands(args: check.Arguments, a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor) -> None:
    for name, value, rows in (("a", a, "M"), ("b", b, "N")):
        if isinstance(value, Tensor):
            _check_operand(args.op, name, value, rows)
        args.tensor(name, value, (rows, "K"), FLOAT8, unit_stride=True)
    args.tensor("unit_a", unit_a, (), SCALAR)
    args.tensor("unit_b", unit_b, (), SCALAR)


def _check_operand(op: str, name: str, value: Tensor, rows: str) -> None:
    """Raise the one line that says all that an operand must be."""
    shaped = value.dim() == 2 and value.shape[1] % 16 == 0 and (rows == "M" or value.shape[0] % 16 == 0)
    if value.dtype in FLOAT8 and shaped:
        return
    sizes = "K % 16 == 0" if rows == "M" else "N % 16 == K % 16 == 0"
    wanted = f"({rows}, K) in float8_e4m3fn or float8_e5m2 with {sizes}"
    got = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    kind = ValueError if value.dtype in FLOAT8 else TypeError
    raise kind(f"{op}: {name} must be {wanted}, got {got}")
