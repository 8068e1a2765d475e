"""The host's own functions give what Triton's give."""

import pytest
import triton

from yaongi.kernels.common.sizes import cdiv, next_power_of_2


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("total", [0, 1, 63, 64, 65, 2**33 + 1])
def test_cdiv(total: int, block: int) -> None:
    assert cdiv(total, block) == triton.cdiv(total, block)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 64, 65, 2**33 + 1])
def test_next_power_of_2(size: int) -> None:
    assert next_power_of_2(size) == triton.next_power_of_2(size)
