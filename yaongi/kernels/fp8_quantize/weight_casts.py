"""Weights cast to FP8 in Triton, in two passes: the largest magnitude, then the cast with the scale that it allows."""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.fp8 import cast8, note_largest
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv
from yaongi.kernels.fp8_quantize.byte_transpose import transpose8_triton

Tensor = torch.Tensor
E4M3 = torch.float8_e4m3fn
BLOCK, WARPS = 4096, 4


@triton.jit
def _weight8_amax_kernel(w_ptr, amax_ptr, count, BLOCK: tl.constexpr):
    """Take the largest magnitude of a block of a contiguous tensor into amax, int32: the bits of a float32."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    note_largest(amax_ptr, tl.load(w_ptr + i, mask=i < count, other=0.0).to(tl.float32))


@triton.jit
def _weight8_cast_kernel(w_ptr, w8_ptr, amax_ptr, unit_ptr, count, BLOCK: tl.constexpr):
    """Cast a block with the scale 2^⌊log2(448 / amax)⌋; as `power_of_two_scale` computes it."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(amax_ptr)
    above = ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.minimum(262 - (bits >> 23) - above, 253)
    exponent = tl.where(bits == 0, 127, exponent)
    finite = bits < 0x7F800000
    scale = tl.where(finite, (exponent << 23), 0x7FC00000).to(tl.float32, bitcast=True)
    unit = tl.where(finite, ((254 - exponent) << 23), 0x7FC00000).to(tl.float32, bitcast=True)
    values = tl.load(w_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(w8_ptr + i, cast8(values, scale, w8_ptr.dtype.element_ty), mask=i < count)
    if tl.program_id(0) == 0:
        tl.store(unit_ptr, unit)


def quantize_weight8_triton(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `quantize_weight8_reference` does."""
    w = w.contiguous()
    w8 = torch.empty(w.shape, dtype=E4M3, device=w.device)
    amax, unit = torch.zeros((), dtype=torch.int32, device=w.device), torch.ones((), device=w.device)
    if w.numel():
        grid = (cdiv(w.numel(), BLOCK),)
        launcher(_weight8_amax_kernel, grid)(w, amax, w.numel(), BLOCK=BLOCK, num_warps=WARPS)
        launcher(_weight8_cast_kernel, grid)(w, w8, amax, unit, w.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return w8, transpose8_triton(w8), unit
