"""The causal convolution's forward: each program walks down a strip and keeps the last inputs in registers.

A strip is BLOCK_C channels of ROWS consecutive positions. Each input is read once, four rows before its use, and the
W − 1 earlier inputs stay in registers, so memory traffic is minimal. All arithmetic is fp32. Names: `x_1` is the row
before the current one, `same_1` says whether it is in the current row's document. Weights are padded to four taps:
`w_0` multiplies the current row, `w_1` the row before it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv

Tensor = torch.Tensor


@dataclass(frozen=True)
class Config:
    """Strip size, in positions and channels per program, and warps per program."""

    rows: int
    block_c: int
    num_warps: int


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter has no inline assembly

# Found on an H100 by benchmarks/tune_causal_conv1d.py, 2026-11-24.
FORWARD = {"long": Config(rows=64, block_c=256, num_warps=2), "short": Config(rows=8, block_c=256, num_warps=2)}


def strip_config(table: dict[str, Config], batch: int, length: int, channels: int) -> Config:
    """Return the long strips if they fill the GPU's 132 multiprocessors several times over, else the short ones."""
    long = table["long"]
    programs = batch * cdiv(length, long.rows) * cdiv(channels, long.block_c)
    return long if programs >= 1024 else table["short"]


@triton.jit
def load_input(x_ptr, row, stride_l, c, mask):
    return tl.load(x_ptr + tl.cast(row, tl.int64) * stride_l + c, mask=mask, other=0.0)


@triton.jit
def load_earlier(x_ptr, state_ptr, row, stride_l, c, mask, C, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """Load a row before the strip, (BLOCK_C,): an input, or where row < 0 the initial state or zero."""
    value = load_input(x_ptr, row, stride_l, c, mask & (row >= 0)).to(tl.float32)
    if HAS_STATE:
        place = row + (W - 1)
        value += tl.load(state_ptr + c * (W - 1) + place, mask=mask & (row < 0) & (place >= 0), other=0.0).to(
            tl.float32
        )
    return value


@triton.jit
def load_document(document_ptr, row, L):
    """Load a row's document id. Rows before the sequence belong to the first document, rows after it to none (−1)."""
    inside = tl.maximum(row, 0)
    return tl.load(document_ptr + inside, mask=inside < L, other=-1)


@triton.jit
def load_tap(weight_ptr, c, mask, back: tl.constexpr, W: tl.constexpr):
    """Load the weight of the row `back` rows before the current one, (BLOCK_C,); zero where the filter is shorter."""
    return tl.load(weight_ptr + c * W + (W - 1 - back), mask=mask & (back < W), other=0.0).to(tl.float32)


@triton.jit
def keep_in_document(value, same, W: tl.constexpr, back: tl.constexpr):
    """Zero a tap's input in another document or beyond the filter; `where`, not a product, so that no NaN leaks."""
    if back < W:
        return tl.where(same, value, 0.0)
    return tl.zeros_like(value)


@triton.jit
def fast_sigmoid(value):
    """Return 1 / (1 + 2^(−log2(e)·value)) from the approximate exponential and reciprocal, flushing denormals.

    The error is 2 ulp, with a third of the instructions of `tl.sigmoid`, which would make the kernel instruction-bound.
    """
    if INTERPRETED:
        return tl.sigmoid(value)
    return tl.inline_asm_elementwise(
        """
        {
            .reg .f32 e;
            mul.ftz.f32 e, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 e, e;
            add.ftz.f32 e, e, 0f3F800000;
            rcp.approx.ftz.f32 $0, e;
        }
        """,
        "=f,f",
        [value],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _causal_conv1d_kernel(
    x_ptr,  # (B, L, C)
    weight_ptr,  # (C, W)
    bias_ptr,  # (C)
    document_ptr,  # (B, L)
    state_ptr,  # (B, C, W − 1)
    y_ptr,  # (B, L, C), contiguous
    final_ptr,  # (B, C, W − 1)
    L,
    C,
    stride_xb,
    stride_xl,
    stride_db,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_c, strips = tl.cdiv(C, BLOCK_C), tl.cdiv(L, ROWS)
    strip = tl.program_id(0) // blocks_c  # of all batch rows; a grid's other dimensions end at 65,535
    start = strip % strips * ROWS
    batch = (strip // strips).to(tl.int64)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    x_ptr += batch * stride_xb
    y_ptr += (batch * L + start) * C
    if HAS_DOCUMENTS:
        document_ptr += batch * stride_db
    if HAS_STATE:
        state_ptr += batch * C * (W - 1)
    w_0, w_1 = load_tap(weight_ptr, c, mask, 0, W), load_tap(weight_ptr, c, mask, 1, W)
    w_2, w_3 = load_tap(weight_ptr, c, mask, 2, W), load_tap(weight_ptr, c, mask, 3, W)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    x_1 = load_earlier(x_ptr, state_ptr, start - 1, stride_xl, c, mask, C, W, HAS_STATE)
    x_2 = load_earlier(x_ptr, state_ptr, start - 2, stride_xl, c, mask, C, W, HAS_STATE)
    x_3 = load_earlier(x_ptr, state_ptr, start - 3, stride_xl, c, mask, C, W, HAS_STATE)
    end = tl.minimum(start + ROWS, L)
    next_0 = load_input(x_ptr, start, stride_xl, c, mask)
    next_1 = load_input(x_ptr, start + 1, stride_xl, c, mask & (start + 1 < end))
    next_2 = load_input(x_ptr, start + 2, stride_xl, c, mask & (start + 2 < end))
    next_3 = load_input(x_ptr, start + 3, stride_xl, c, mask & (start + 3 < end))
    same_1, same_2, same_3 = True, True, True
    if HAS_DOCUMENTS:
        document_1, document_2 = load_document(document_ptr, start - 1, L), load_document(document_ptr, start - 2, L)
        document_3, next_document = load_document(document_ptr, start - 3, L), load_document(document_ptr, start, L)
    for step in tl.range(0, ROWS, loop_unroll_factor=4):  # four steps rotate the rows without moving registers
        row = start + step
        x_0 = next_0.to(tl.float32)
        next_0, next_1, next_2 = next_1, next_2, next_3
        next_3 = load_input(x_ptr, row + 4, stride_xl, c, mask & (row + 4 < end))
        if HAS_DOCUMENTS:
            document = next_document
            next_document = load_document(document_ptr, row + 1, L)
            same_1, same_2, same_3 = document == document_1, document == document_2, document == document_3
            document_3, document_2, document_1 = document_2, document_1, document
        y = bias + w_0 * x_0
        y += w_1 * keep_in_document(x_1, same_1, W, 1)
        y += w_2 * keep_in_document(x_2, same_2, W, 2)
        y += w_3 * keep_in_document(x_3, same_3, W, 3)
        if SILU:
            y = y * fast_sigmoid(y)
        tl.store(y_ptr + c, y.to(y_ptr.dtype.element_ty), mask=mask & (row < end))
        y_ptr += C
        x_3, x_2, x_1 = x_2, x_1, x_0
    if HAS_FINAL:
        for i in tl.static_range(W - 1):
            row = L - (W - 1) + i
            value = load_earlier(x_ptr, state_ptr, row, stride_xl, c, mask & (end == L), C, W, HAS_STATE)
            if HAS_DOCUMENTS:
                same = load_document(document_ptr, row, L) == load_document(document_ptr, L - 1, L)
                value = tl.where(same, value, 0.0)
            place = (batch * C + c) * (W - 1) + i
            tl.store(final_ptr + place, value.to(final_ptr.dtype.element_ty), mask=mask & (end == L))


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """Compute what `causal_conv1d_reference` does, for W of 2 to 4."""
    (batch, length, channels), width = x.shape, weight.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = x.new_empty((batch, channels, width - 1) if return_final_state else (0,))
    config = strip_config(FORWARD, batch, length, channels)
    if batch * channels:
        programs = cdiv(channels, config.block_c) * cdiv(length, config.rows) * batch
        launcher(_causal_conv1d_kernel, (programs,))(
            x,
            weight.contiguous(),
            bias,
            document_ids,
            None if initial_state is None else initial_state.contiguous(),
            y,
            final,
            length,
            channels,
            x.stride(0),
            x.stride(1),
            0 if document_ids is None else document_ids.stride(0),
            W=width,
            SILU=activation == "silu",
            HAS_BIAS=bias is not None,
            HAS_DOCUMENTS=document_ids is not None,
            HAS_STATE=initial_state is not None,
            HAS_FINAL=return_final_state,
            ROWS=config.rows,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
    return y, final
