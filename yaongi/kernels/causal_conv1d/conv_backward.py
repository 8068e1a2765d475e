"""The causal convolution's gradients: programs walk strips as in conv_forward.py, each with a halo of three rows.

x, dy and dx each cross memory once, and x and dy once more in the halos. Each program writes one partial sum of the
gradients of weight and bias; these are added in a fixed order, so the result is bitwise reproducible.
"""

import torch
import triton
import triton.language as tl

from yaongi.kernels.causal_conv1d.conv_forward import (
    Config,
    fast_sigmoid,
    keep_in_document,
    load_document,
    load_earlier,
    load_input,
    load_tap,
    strip_config,
)
from yaongi.kernels.common.column_sums import column_sums
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv

Tensor = torch.Tensor

BACKWARD = {"long": Config(rows=256, block_c=256, num_warps=2), "short": Config(rows=16, block_c=256, num_warps=2)}


@triton.jit
def _store_dx(
    dx,  # (BLOCK_C)
    row,
    dx_ptr,
    dfinal_ptr,
    dstate_ptr,
    document_ptr,
    start,
    end,
    L,
    C,
    stride_gl,
    c,
    mask,
    W: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
):
    """Add the final state's gradient to a completed row of dx; store it in dx, or in dstate where row < 0."""
    if HAS_DFINAL:
        i = row - (L - (W - 1))
        reached = (i >= 0) & (row < L)
        if HAS_DOCUMENTS:
            reached &= load_document(document_ptr, row, L) == load_document(document_ptr, L - 1, L)
        dx += tl.load(dfinal_ptr + c * (W - 1) + i, mask=mask & reached, other=0.0).to(tl.float32)
    own = (row >= start) & (row < end)
    tl.store(dx_ptr + tl.cast(row, tl.int64) * stride_gl + c, dx.to(dx_ptr.dtype.element_ty), mask=mask & own)
    if HAS_STATE:
        place = row + (W - 1)
        before = (start == 0) & (row < 0) & (place >= 0)
        tl.store(dstate_ptr + c * (W - 1) + place, dx.to(dstate_ptr.dtype.element_ty), mask=mask & before)


@triton.jit
def _causal_conv1d_backward_kernel(
    dy_ptr,  # (B, L, C)
    dfinal_ptr,  # (B, C, W − 1)
    x_ptr,  # (B, L, C)
    weight_ptr,  # (C, W)
    bias_ptr,  # (C)
    document_ptr,  # (B, L)
    state_ptr,  # (B, C, W − 1)
    dx_ptr,  # (B, L, C)
    dstate_ptr,  # (B, C, W − 1)
    partial_ptr,  # (B · strips, W + 1, C), fp32: the weight's gradient, then the bias's
    L,
    C,
    stride_yb,
    stride_yl,
    stride_xb,
    stride_xl,
    stride_gb,
    stride_gl,
    stride_db,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute dp_r row by row: it adds to dw and to dx of rows r − 3 … r, and completes row r − 3."""
    blocks_c, strips = tl.cdiv(C, BLOCK_C), tl.cdiv(L, ROWS)
    strip = tl.program_id(0) // blocks_c  # of all batch rows; a grid's other dimensions end at 65,535
    start = strip % strips * ROWS
    batch = (strip // strips).to(tl.int64)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    dy_ptr += batch * stride_yb
    x_ptr += batch * stride_xb
    dx_ptr += batch * stride_gb
    if HAS_DOCUMENTS:
        document_ptr += batch * stride_db
    if HAS_STATE:
        state_ptr += batch * C * (W - 1)
        dstate_ptr += batch * C * (W - 1)
    if HAS_DFINAL:
        dfinal_ptr += batch * C * (W - 1)
    w_0, w_1 = load_tap(weight_ptr, c, mask, 0, W), load_tap(weight_ptr, c, mask, 1, W)
    w_2, w_3 = load_tap(weight_ptr, c, mask, 2, W), load_tap(weight_ptr, c, mask, 3, W)
    zero = tl.zeros((BLOCK_C,), tl.float32)
    bias = zero
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    x_1 = load_earlier(x_ptr, state_ptr, start - 1, stride_xl, c, mask, C, W, HAS_STATE)
    x_2 = load_earlier(x_ptr, state_ptr, start - 2, stride_xl, c, mask, C, W, HAS_STATE)
    x_3 = load_earlier(x_ptr, state_ptr, start - 3, stride_xl, c, mask, C, W, HAS_STATE)
    end = tl.minimum(start + ROWS, L)
    last = tl.minimum(start + ROWS + 3, L)  # three rows of the next strip reach back into this one
    next_x0, next_dy0 = load_input(x_ptr, start, stride_xl, c, mask), load_input(dy_ptr, start, stride_yl, c, mask)
    next_x1 = load_input(x_ptr, start + 1, stride_xl, c, mask & (start + 1 < last))
    next_dy1 = load_input(dy_ptr, start + 1, stride_yl, c, mask & (start + 1 < last))
    next_x2 = load_input(x_ptr, start + 2, stride_xl, c, mask & (start + 2 < last))
    next_dy2 = load_input(dy_ptr, start + 2, stride_yl, c, mask & (start + 2 < last))
    next_x3 = load_input(x_ptr, start + 3, stride_xl, c, mask & (start + 3 < last))
    next_dy3 = load_input(dy_ptr, start + 3, stride_yl, c, mask & (start + 3 < last))
    dx_1, dx_2, dx_3 = zero, zero, zero
    dw_0, dw_1, dw_2, dw_3, dbias = zero, zero, zero, zero, zero
    same_1, same_2, same_3 = True, True, True
    if HAS_DOCUMENTS:
        document_1, document_2 = load_document(document_ptr, start - 1, L), load_document(document_ptr, start - 2, L)
        document_3, next_document = load_document(document_ptr, start - 3, L), load_document(document_ptr, start, L)
    for step in tl.range(0, ROWS + 4, loop_unroll_factor=4):  # four steps rotate the rows without moving registers
        row = start + step  # from `last` on dy is loaded as zero; these steps only complete earlier rows
        x_0, dp = next_x0.to(tl.float32), next_dy0.to(tl.float32)
        next_x0, next_x1, next_x2 = next_x1, next_x2, next_x3
        next_dy0, next_dy1, next_dy2 = next_dy1, next_dy2, next_dy3
        next_x3 = load_input(x_ptr, row + 4, stride_xl, c, mask & (row + 4 < last))
        next_dy3 = load_input(dy_ptr, row + 4, stride_yl, c, mask & (row + 4 < last))
        if HAS_DOCUMENTS:
            document = next_document
            next_document = load_document(document_ptr, row + 1, L)
            same_1, same_2, same_3 = document == document_1, document == document_2, document == document_3
            document_3, document_2, document_1 = document_2, document_1, document
        tap_1, tap_2, tap_3 = (
            keep_in_document(x_1, same_1, W, 1),
            keep_in_document(x_2, same_2, W, 2),
            keep_in_document(x_3, same_3, W, 3),
        )
        if SILU:
            p = bias + w_0 * x_0
            p += w_1 * tap_1
            p += w_2 * tap_2
            p += w_3 * tap_3
            gate = fast_sigmoid(p)
            dp = dp * gate * (1 + p * (1 - gate))
        if row < end:
            dw_0 += dp * x_0
            dw_1 += dp * tap_1
            dw_2 += dp * tap_2
            dw_3 += dp * tap_3
            dbias += dp
        dx_3 += keep_in_document(w_3 * dp, same_3, W, 3)
        dx_2 += keep_in_document(w_2 * dp, same_2, W, 2)
        dx_1 += keep_in_document(w_1 * dp, same_1, W, 1)
        _store_dx(
            dx_3, row - 3, dx_ptr, dfinal_ptr, dstate_ptr, document_ptr, start, end, L, C, stride_gl, c, mask,
            W, HAS_DOCUMENTS, HAS_STATE, HAS_DFINAL,
        )  # fmt: skip
        dx_3, dx_2, dx_1 = dx_2, dx_1, w_0 * dp
        x_3, x_2, x_1 = x_2, x_1, x_0
    partial_ptr += strip.to(tl.int64) * (W + 1) * C
    tl.store(partial_ptr + (W - 1) * C + c, dw_0, mask=mask)
    tl.store(partial_ptr + (W - 2) * C + c, dw_1, mask=mask)
    if W >= 3:
        tl.store(partial_ptr + (W - 3) * C + c, dw_2, mask=mask)
    if W >= 4:
        tl.store(partial_ptr + c, dw_3, mask=mask)
    tl.store(partial_ptr + W * C + c, dbias, mask=mask)


def causal_conv1d_backward_triton(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `causal_conv1d_backward_reference` does, for W of 2 to 4; `dx`, if given, may be a slice."""
    (batch, length, channels), width = x.shape, weight.shape[1]
    config = strip_config(BACKWARD, batch, length, channels)
    strips = cdiv(length, config.rows)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    dinitial_state = x.new_empty(0 if initial_state is None else initial_state.shape)
    partial = x.new_empty(batch * strips, width + 1, channels, dtype=torch.float32)
    if batch * channels:
        launcher(_causal_conv1d_backward_kernel, (cdiv(channels, config.block_c) * strips * batch,))(
            dy,
            None if dfinal_state is None else dfinal_state.contiguous(),
            x,
            weight.contiguous(),
            bias,
            document_ids,
            None if initial_state is None else initial_state.contiguous(),
            dx,
            dinitial_state,
            partial,
            length,
            channels,
            dy.stride(0),
            dy.stride(1),
            x.stride(0),
            x.stride(1),
            dx.stride(0),
            dx.stride(1),
            0 if document_ids is None else document_ids.stride(0),
            W=width,
            SILU=activation == "silu",
            HAS_BIAS=bias is not None,
            HAS_DOCUMENTS=document_ids is not None,
            HAS_STATE=initial_state is not None,
            HAS_DFINAL=dfinal_state is not None,
            ROWS=config.rows,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
    total = column_sums(partial.flatten(1)[None]).view(width + 1, channels)
    dbias = x.new_empty(0) if bias is None else total[width]
    return dx, total[:width].mT.contiguous(), dbias, dinitial_state
