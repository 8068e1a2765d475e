"""Every Triton kernel on every GPU generation that the README names: it compiles, fits, and spills little.

The same launch options are run on an H100, where their results are compared to the references.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from aot import compile_launcher
from op_cases import cases, run
from support import assert_rule
from test_triton_aot import FLAT, meta
from test_triton_aot_mamba import scan_arguments

from yaongi.kernels.attention_step import cached_attention
from yaongi.kernels.causal_conv1d import conv_backward, conv_forward, step
from yaongi.kernels.common import generations
from yaongi.kernels.cross_entropy import loss_kernels
from yaongi.kernels.likeliest import two_stages
from yaongi.kernels.linear_step import few_rows_linear
from yaongi.kernels.mamba_scan import decode, scan_backward, scan_forward
from yaongi.kernels.moe import experts_backward, experts_forward, routing
from yaongi.kernels.moe_step import token_experts
from yaongi.kernels.newton_schulz import passes, teon
from yaongi.kernels.rms_norm import norm_kernels

# Most shared memory of a program, in KB, by compute capability (CUDA programming guide, technical specifications).
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SPILLED = 128  # bytes per thread that a kernel may spill; on generation 12 every kernel has a frame of 8
# The scan's tiles go through descriptors, which the generation before TMA replaces by pointers: they cost registers.
SPILLED_MORE = {(8, "_mamba_scan_gradients_kernel"): 4608, (12, "_mamba_scan_gradients_kernel"): 512}
FLOAT = torch.float32


def experts() -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    T, D, E, K, F = 32768, 2048, 64, 6, 512
    x, w_up, w_down, a = meta(T, D), meta(E, F, D), meta(E, D, F), meta(T * K, F)
    ids, weights = meta(T, K, dtype=torch.int32), meta(T, K, dtype=FLOAT)
    backward = (x, x, w_up, w_down, ids, weights, a)
    yield experts_forward.moe_triton, (x, w_up, w_down, ids, weights)
    routing_of_few = meta(64, K, dtype=torch.int32), meta(64, K, dtype=FLOAT)
    yield experts_forward.moe_triton, (meta(64, D), w_up, w_down, *routing_of_few)
    few = (
        meta(4, D),
        w_up,
        w_down,
        meta(2 * F, D),
        meta(D, 2 * F),
        meta(4, K, dtype=torch.int32),
        meta(4, K, dtype=FLOAT),
    )
    yield token_experts.moe_step_triton, (*few, True)
    yield experts_backward.moe_backward_triton, backward
    sums = (meta(*w.shape, dtype=FLOAT) for w in (w_up, w_down))
    yield experts_backward.moe_backward_accumulate_triton, (*backward, *sums)
    logits = meta(T, E, dtype=FLOAT)
    yield routing.moe_route_triton, (logits, meta(E, dtype=FLOAT), K, 2.5)
    yield routing.moe_route_backward_triton, (weights, logits, ids, 2.5)


def mamba() -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    for arguments in (
        scan_arguments(4096, 64, 8, 128, torch.bfloat16, True),
        scan_arguments(32768, 64, 8, 128, torch.bfloat16, True),
        scan_arguments(128, 16, 2, 16, FLOAT, True),
    ):
        yield scan_forward.mamba_scan_triton, (*arguments, True)
        yield scan_backward.mamba_scan_backward_triton, (arguments[0], arguments[-1], *arguments)
    state, x, dt, b, head = (
        meta(64, 64, 64, 128, dtype=FLOAT),
        meta(64, 64, 64),
        meta(64, 64),
        meta(64, 8, 128),
        meta(64),
    )
    yield decode.mamba_step_triton, (state, x, dt, head, b, b, head, head)
    yield step.causal_conv1d_step_triton, (meta(64, 6144), meta(64, 6144, 3), meta(6144, 4), meta(6144), "silu", None)
    x = meta(8, 4096, 10304)[..., 4096:]
    state, ids = meta(8, 6208, 3), meta(8, 4096, dtype=torch.int32)
    inputs = (x, meta(6208, 4), meta(6208), ids, state, "silu")
    yield conv_forward.causal_conv1d_triton, (*inputs, True)
    yield conv_backward.causal_conv1d_backward_triton, (x, state, *inputs)


def others() -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    for width in (2048, 32768):
        for rows in (1, 16):
            inputs = meta(rows, 2048), meta(width, 2048), meta(rows, width)
            yield few_rows_linear.linear_step_triton, (*inputs, None, False, True)
    yield few_rows_linear.linear_steps_triton, (meta(1, 2048), [meta(width, 2048) for width in (2048, 512, 512)], True)
    yield two_stages.likeliest_triton, (meta(64, 32768),)
    q, k, cache = meta(64, 32, 64), meta(64, 8, 64), meta(64, 8, 512, 64)
    rows = meta(64, 512, dtype=torch.bool), meta(64, dtype=torch.int64)
    yield cached_attention.attention_step_triton, (q, k, k, cache, cache, *rows, 256)
    x, z, wide = meta(8, 4096, 4096), meta(8, 4096, 10304)[..., :4096], meta(8, 4096, 2048)
    yield norm_kernels.gated_rms_norm_triton, (x, z, meta(4096), 1e-5, 8)
    yield norm_kernels.gated_rms_norm_backward_triton, (x, x, z, meta(4096), 1e-5, 8)
    yield norm_kernels.rms_norm_triton, (wide, meta(2048), wide, 1e-5)
    yield norm_kernels.rms_norm_backward_triton, (wide, wide, wide, meta(2048), 1e-5)
    logits, rows, targets = meta(4096, 32768), meta(4096, dtype=FLOAT), meta(4096, dtype=torch.int64)
    yield loss_kernels.cross_entropy_triton, (logits, targets)
    yield loss_kernels.cross_entropy_backward_triton, (rows, rows, logits, targets, rows)
    yield passes.newton_schulz_triton, (meta(64, 512, 2048), FLAT, "gram")
    narrow, wide = meta(64, 512, 2048), meta(64, 512, 2048, dtype=FLOAT)
    yield teon.teon_update_triton, ([narrow], [wide], [narrow], [wide], 1, 0.02, 0.95, True, 0.1, FLAT)


IN_CI = {(86, experts), (86, others)}  # the least shared memory, and no TMA; `-m long` compiles all of them
CASES = [(capability, launches) for capability in SHARED for launches in (experts, mamba, others)]


@pytest.mark.parametrize(
    ("capability", "launches"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[1].__name__}", marks=() if case in IN_CI else pytest.mark.long)
        for case in CASES
    ],
)
def test_every_kernel_fits(capability: int, launches: Callable[[], Iterator[Any]]) -> None:
    for launcher, arguments in launches():
        for kernel in compile_launcher(launcher, *arguments, capability=capability):
            assert kernel.shared_bytes <= SHARED[capability] * 1024, kernel.name
            bound = SPILLED_MORE.get((capability // 10, kernel.name), SPILLED)
            spilled = 0 if kernel.rare else kernel.spilled_bytes
            assert spilled <= bound, f"{kernel.name}: {spilled} bytes per thread"


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["moe", "mamba_scan", "mamba_core"])
@pytest.mark.parametrize("generation", [8, 10, 12])
def test_the_options_of_other_generations_are_right(generation: int, op: str) -> None:
    """On this GPU, with their tiles: the tolerance rule, and the same bits in two runs."""
    case = cases()[op]
    with mock.patch.object(generations, "generation_of", return_value=generation):
        assert_rule(lambda arguments: run(op, arguments, case.wanted), case.on("cuda"), "triton")
