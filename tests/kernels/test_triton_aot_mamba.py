"""Compile the kernels of the Mamba mixer (scan, step, norms) for sm_90, as test_triton_aot.py does."""

import pytest
import torch
from aot import compile_launcher

from yaongi.kernels.mamba_scan import decode as mamba_step
from yaongi.kernels.mamba_scan import scan_backward as mamba_gradients
from yaongi.kernels.mamba_scan import scan_forward as mamba_scan
from yaongi.kernels.rms_norm import norm_kernels as norm

H = 64
PRODUCTS = {"_mamba_scan_output_kernel", "_mamba_scan_states_kernel", "_mamba_scan_gradients_kernel"}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def scan_arguments(L: int, P: int, G: int, N: int, dtype: torch.dtype, everything: bool) -> tuple[torch.Tensor, ...]:
    """Return the inputs of a scan over 32,768 tokens, with or without documents and an initial state."""
    B = 32768 // L
    x, b, c = meta(B, L, H * P + 2 * G * N, dtype=dtype).split([H * P, G * N, G * N], dim=-1)
    per_head = meta(H, dtype=torch.float32)
    ids, state = meta(B, L, dtype=torch.int32), meta(B, H, P, N, dtype=torch.float32)
    dt = meta(B, L, 2 * H * P + 2 * G * N + H, dtype=dtype)[..., -H:]
    inputs = (x.unflatten(-1, (H, P)), dt, per_head, b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N)))
    return *inputs, *((per_head, per_head, ids, state) if everything else (per_head, None, None, None))


@pytest.mark.parametrize(
    ("L", "P", "G", "N", "dtype", "everything"),
    [
        (4096, 64, 8, 128, torch.bfloat16, False),
        (4096, 64, 8, 128, torch.bfloat16, True),
        pytest.param(32768, 64, 8, 128, torch.bfloat16, True, marks=pytest.mark.long),
        pytest.param(4096, 128, 1, 64, torch.float16, True, marks=pytest.mark.long),
        pytest.param(4096, 64, 8, 256, torch.bfloat16, True, marks=pytest.mark.long),
        (128, 16, 2, 16, torch.float32, True),
    ],
)
def test_mamba_scan(L: int, P: int, G: int, N: int, dtype: torch.dtype, everything: bool) -> None:
    """All kernels of both directions use tensor cores and TMA, without spills at the flagship's sizes."""
    inputs = scan_arguments(L, P, G, N, dtype, everything)
    kernels = compile_launcher(mamba_scan.mamba_scan_triton, *inputs, everything)
    kernels += compile_launcher(mamba_gradients.mamba_scan_backward_triton, inputs[0], inputs[-1], *inputs)
    names = {kernel.name for kernel in kernels}
    assert names >= PRODUCTS | {"_mamba_scan_decays_kernel", "_mamba_scan_decays_backward_kernel"}
    assert L < 32768 or "_mamba_scan_chain_kernel" in names
    for kernel in kernels:
        assert kernel.shared_bytes <= 227 * 1024
        if dtype != torch.float32 and kernel.name in PRODUCTS:
            assert "HGMMA" in kernel.sass
            assert "UTMALDG" in kernel.sass
        if (P, N) == (64, 128) and not kernel.rare:
            most = 8 if kernel.name == "_mamba_scan_output_kernel" else 0  # two words, outside its loop
            assert kernel.spilled_bytes <= most, kernel.name
        if (P, N) == (64, 128) and kernel.name == "_mamba_scan_output_kernel":
            assert kernel.shared_bytes <= 113 * 1024  # two programs per multiprocessor


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16])
def test_mamba_step(state_dtype: torch.dtype) -> None:
    """The state is read in wide loads and stays in registers."""
    B, P, G, N = 64, 64, 8, 128
    state, x, dt = meta(B, H, P, N, dtype=state_dtype), meta(B, H, P), meta(B, H)
    b, per_head = meta(B, G, N), meta(H, dtype=torch.float32)
    (kernel,) = compile_launcher(mamba_step.mamba_step_triton, state, x, dt, per_head, b, b, per_head, per_head)
    assert kernel.spilled_bytes == 0
    assert kernel.early_loads == 0
    assert "LDG.E.128" in kernel.sass


def test_norm_of_few_rows() -> None:
    """It waits for the kernel ahead before it reads anything."""
    kernels = compile_launcher(norm.gated_rms_norm_triton, meta(1, 4096), meta(1, 4096), meta(4096), 1e-5, 8)
    kernels += compile_launcher(norm.rms_norm_triton, meta(1, 2048), meta(2048), meta(1, 2048), 1e-5)
    assert [kernel.early_loads for kernel in kernels] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm(dtype: torch.dtype) -> None:
    """The flagship's norms and a wide row: wide loads; only the backward spills, six words at most, and is faster."""
    x, z = meta(8, 4096, 4096, dtype=dtype), meta(8, 4096, 10304, dtype=dtype)[..., :4096]
    kernels = compile_launcher(norm.gated_rms_norm_triton, x, z, meta(4096), 1e-5, 8)
    kernels += compile_launcher(norm.gated_rms_norm_backward_triton, x, x, z, meta(4096), 1e-5, 8)
    for width in (2048, 4096):
        x = meta(8, 4096, width, dtype=dtype)
        kernels += compile_launcher(norm.rms_norm_triton, x, meta(width), x, 1e-5)
        kernels += compile_launcher(norm.rms_norm_backward_triton, x, x, x, meta(width), 1e-5)
    for kernel in kernels:
        assert kernel.spilled_bytes <= (24 if "backward" in kernel.name else 0), kernel.name
        assert "LDG.E.128" in kernel.sass, kernel.name
