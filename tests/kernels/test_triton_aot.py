"""Compiles every config of every Triton launcher for sm_90, without a GPU, and reads registers, spills and code."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from aot import Compiled, compile_launcher

from yaongi.kernels.causal_conv1d import triton_impl as causal_conv1d


@dataclass(frozen=True)
class Launch:
    """One call of a launcher, under one config of its table."""

    launcher: Callable[..., Any]
    arguments: tuple[Any, ...]
    module: Any
    table: str
    config: Any

    def compile(self) -> list[Compiled]:
        with mock.patch.object(self.module, self.table, {"long": self.config, "short": self.config}):
            return compile_launcher(self.launcher, *self.arguments)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def causal_conv1d_launches() -> Iterator[Any]:
    """Both directions, plain and with everything, in bf16 and fp32."""
    for dtype in (torch.bfloat16, torch.float32):
        x = meta(8, 4096, 10304, dtype=dtype)[..., 4096:]
        weight, bias, state = meta(6208, 4), meta(6208), meta(8, 6208, 3, dtype=dtype)
        ids = meta(8, 4096, dtype=torch.int32)
        for extras in ((None, None), (ids, state)):
            inputs, everything = (x, weight, bias, *extras, "silu"), extras[0] is not None
            calls = {
                "FORWARD": (causal_conv1d.causal_conv1d_triton, (*inputs, everything)),
                "BACKWARD": (causal_conv1d.causal_conv1d_backward_triton, (x, extras[1], *inputs)),
            }
            for table, (launcher, arguments) in calls.items():
                for name, config in getattr(causal_conv1d, table).items():
                    yield pytest.param(
                        Launch(launcher, arguments, causal_conv1d, table, config),
                        id=f"{table.lower()}-{name}-{dtype}-{'all' if everything else 'plain'}".replace("torch.", ""),
                    )


@pytest.mark.parametrize("launch", list(causal_conv1d_launches()))
def test_causal_conv1d(launch: Launch) -> None:
    """Wide loads, no spills, and registers that leave room for enough warps."""
    (kernel,) = launch.compile()
    assert kernel.spilled_bytes == 0
    assert kernel.registers <= (128 if launch.table == "FORWARD" else 255)
    assert "LDG.E.64" in kernel.sass or "LDG.E.128" in kernel.sass
