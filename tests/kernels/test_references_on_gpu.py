"""Every op's reference on a GPU: the same results and gradients there as on the CPU, in float32 and float64."""

from collections.abc import Iterator

import pytest
import torch
from op_cases import cases, run
from oracle import assert_equal_to_float64

from yaongi.kernels import use_backend

RELATIVE = {torch.float64: 1e-12, torch.float32: 3e-5}  # of the largest value: sums run in another order


@pytest.fixture(autouse=True)
def without_tf32() -> Iterator[None]:
    """Compute float32 products in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("op", cases())
def test_reference_on_a_gpu_equals_the_cpu(op: str, dtype: torch.dtype) -> None:
    case = cases()[op]
    with use_backend("reference"):
        expected, results = (run(op, case.on(device, dtype), case.wanted) for device in ("cpu", "cuda"))
    for name, result in results.items():
        assert result.is_cuda, name
        assert_equal_to_float64(result.cpu(), expected[name], RELATIVE[dtype], name)
