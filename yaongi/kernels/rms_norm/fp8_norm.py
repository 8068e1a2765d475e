"""`rms_norm` in Triton whose results are FP8: the forward's output, and the backward's gradient for the layer before.

The forward keeps r of each row. The backward normalises x with it again, in the same two roundings, so that the
transposed bytes it returns are the forward's.
"""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.column_sums import column_sums
from yaongi.kernels.common.fp8 import cast8, note_largest
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv
from yaongi.kernels.fp8_quantize.byte_transpose import transpose8_triton
from yaongi.kernels.rms_norm.norm_kernels import FORWARD, PROGRAMS, STAGES, Config, row_blocks

Tensor = torch.Tensor
E4M3 = torch.float8_e4m3fn
BACKWARD = Config(elements=2048, elements_per_warp=512)  # 128 registers; with half as many warps it takes all 255


@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "amax_ptr"])
def _norm8_kernel(
    x_ptr,  # (T, D)
    weight_ptr,  # (D)
    scale_ptr,  # (), fp32
    amax_ptr,  # (), int32: the bits of a float32
    y8_ptr,  # (T, D), contiguous
    y_ptr,  # (T, D), contiguous
    inverse_rms_ptr,  # (T), fp32
    T,
    D,
    eps,
    stride_x,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute y = x·r·w for a block of rows, cast it, and store r; with WIDE also store y."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    mask = (row < T) & (channel < D)
    x = tl.load(x_ptr + row * stride_x + channel, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
    inverse_rms = (1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / D + eps))[:, None]
    y = x * inverse_rms * weight
    note_largest(amax_ptr, y)
    tl.store(y8_ptr + row * D + channel, cast8(y, tl.load(scale_ptr), y8_ptr.dtype.element_ty), mask=mask)
    if WIDE:
        tl.store(y_ptr + row * D + channel, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(inverse_rms_ptr + row, inverse_rms, mask=row < T)


@triton.jit(do_not_specialize_on_alignment=["scale_y_ptr", "scale_d_ptr", "amax_ptr"])
def _norm8_backward_kernel(
    dy_ptr,  # (T, D)
    extra_ptr,  # (T, D), another gradient of x
    x_ptr,  # (T, D)
    weight_ptr,  # (D)
    inverse_rms_ptr,  # (T), fp32
    scale_y_ptr,  # (), fp32
    scale_d_ptr,  # (), fp32
    amax_ptr,  # (), int32: the bits of a float32
    dx_ptr,  # (T, D), contiguous
    d8_ptr,  # (T, D), contiguous: dx
    y8_ptr,  # (T, D), contiguous
    partial_ptr,  # (programs, D), fp32: the weight's gradient
    T,
    D,
    stride_dy,
    stride_e,
    stride_x,
    HAS_EXTRA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute dx = r·(g − n·mean(g·n)) + extra with g = dy·w and n = x·r; cast dx, and y = n·w once more."""
    channel = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
    scale_y, scale_d = tl.load(scale_y_ptr), tl.load(scale_d_ptr)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    largest = tl.zeros((ROWS, BLOCK), tl.int32)
    for start in tl.range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < T) & (channel < D)
        x = tl.load(x_ptr + row * stride_x + channel, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * stride_dy + channel, mask=mask, other=0.0).to(tl.float32)
        inverse_rms = tl.load(inverse_rms_ptr + row, mask=row < T, other=0.0)
        normalised = x * inverse_rms
        y8 = cast8(normalised * weight, scale_y, y8_ptr.dtype.element_ty)
        tl.store(y8_ptr + row * D + channel, y8, mask=mask)
        dweight += dy * normalised
        dnormalised = dy * weight
        mean = (tl.sum(dnormalised * normalised, 1) / D)[:, None]
        dx = inverse_rms * (dnormalised - normalised * mean)
        if HAS_EXTRA:
            dx += tl.load(extra_ptr + row * stride_e + channel, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, dx.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        tl.store(dx_ptr + row * D + channel, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(d8_ptr + row * D + channel, cast8(dx, scale_d, d8_ptr.dtype.element_ty), mask=mask)
    note_largest(amax_ptr, largest.to(tl.float32, bitcast=True))
    place = partial_ptr + tl.program_id(0).to(tl.int64) * D + channel
    tl.store(place, tl.sum(dweight, 0)[None, :], mask=channel < D)


def rms_norm8_triton(
    x: Tensor, weight: Tensor, eps: float, scale: Tensor, amax: Tensor, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `rms_norm8_reference` does."""
    T, D = x.shape
    y8 = torch.empty(T, D, dtype=E4M3, device=x.device)
    y = torch.empty(T if wide else 0, D, dtype=x.dtype, device=x.device)
    inverse_rms = torch.empty(T, dtype=torch.float32, device=x.device)
    if x.numel():
        blocks = row_blocks(FORWARD, D)
        launcher(_norm8_kernel, (cdiv(T, blocks["ROWS"]),))(
            x,
            weight.contiguous(),
            scale,
            amax.view(torch.int32),
            y8,
            y if wide else None,
            inverse_rms,
            T,
            D,
            eps,
            x.stride(0),
            WIDE=wide,
            **blocks,
        )
    return y8, y if wide else x.new_empty(0), inverse_rms


def rms_norm8_backward_triton(
    dy: Tensor,
    extra: Tensor | None,
    x: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    scale_y: Tensor,
    scale_d: Tensor,
    amax: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `rms_norm8_backward_reference` does."""
    T, D = x.shape
    dx = torch.empty(T, D, dtype=x.dtype, device=x.device)
    d8, y8 = (torch.empty(T, D, dtype=E4M3, device=x.device) for _ in range(2))
    if not x.numel():
        return dx, d8, d8.new_empty(D, T), y8.new_empty(D, T), torch.zeros(D, dtype=torch.float32, device=x.device)
    blocks = row_blocks(BACKWARD, D)
    programs = min(cdiv(T, blocks["ROWS"]), PROGRAMS)
    partial = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    launcher(_norm8_backward_kernel, (programs,))(
        dy,
        extra,
        x,
        weight.contiguous(),
        inverse_rms,
        scale_y,
        scale_d,
        amax.view(torch.int32),
        dx,
        d8,
        y8,
        partial,
        T,
        D,
        dy.stride(0),
        0 if extra is None else extra.stride(0),
        x.stride(0),
        HAS_EXTRA=extra is not None,
        STAGES=STAGES[x.element_size()],
        **blocks,
    )
    return dx, d8, transpose8_triton(d8), transpose8_triton(y8), column_sums(partial[None])[0]
