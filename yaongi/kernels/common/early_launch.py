"""Programmatic dependent launch, for the many short kernels of a step of generation.

From Hopper on a kernel may be launched while the one before it still runs. Its programs take their places, begin to
fetch weights, and wait until the kernel before has ended. Every kernel of a chain waits before it writes, so that one
that has waited may read what any kernel before it has written.

Before the wait a kernel may fetch into L2, where nothing grows stale, but read only what is *settled*: what no kernel
that may still run writes. Weights are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from yaongi.kernels.common import generations


def early_launch(t: torch.Tensor) -> dict[str, Any]:
    """Return the options of a kernel with a constant EARLY that works on a tensor's device."""
    early = t.device.type != "cpu" and generations.generation_of(t.device) >= 9
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """Let the next kernel take its places."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Wait until the previous kernel has ended. Nothing that a kernel has written may be read before."""
    if EARLY:
        gdc_wait()


@triton.jit
def fetch_into_l2(pointers, EARLY: tl.constexpr):
    """Begin to fetch the cache lines that the pointers lie in."""
    if EARLY:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
