"""The squared-ReLU experts' forward: fused stages over rows sorted by expert, without host synchronisation.

dispatch   counting sort of the routed pairs: rows by expert, and their inverse            3 launches
up         gathers x as it loads the operand, writes A = relu(H)²                          (T·K, D) → (T·K, F)
down       scales the accumulator by the expert weight, writes rows                        (T·K, F) → (T·K, D)
combine    y_t = Σ_k of the token's rows, in order                                         (T·K, D) → (T, D)

For few tokens `few_tokens.py` does the same without dispatch.
"""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.descriptors import matrix_descriptor
from yaongi.kernels.common.fp8 import cast8, note_largest
from yaongi.kernels.common.generations import for_gpu
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv
from yaongi.kernels.moe.dispatch import Dispatch, dispatch, moe_combine
from yaongi.kernels.moe.few_tokens import FEW, moe_few_triton
from yaongi.kernels.moe.grouped_gemm import (
    SMALL,
    Config,
    Fp8,
    block_e,
    find_tile,
    gathered_expert_dot,
    launch_options,
    moe_grouped_gemm,
)

Tensor = torch.Tensor

# Found on an H100, T 32768, D 2048, E 64, K 6, F 256 to 1024, 2026-11-24 (docs/LAB.md). A row tile is BLOCK_M × block_n
UP = {8: SMALL, 9: Config(block_n=256, block_k=64, num_warps=8, num_stages=4), 12: SMALL}


@triton.jit(do_not_specialize_on_alignment=["unit_x_ptr", "unit_w_ptr", "scale_ptr", "amax_ptr"])
def _moe_up_kernel(
    x_ptr,  # (T, D)
    w_desc,  # (E·F, D)
    token_ptr,
    offset_ptr,
    tile_end_ptr,
    a_ptr,  # (T·K, F)
    unit_x_ptr,  # (), fp32; with the three below None unless FP8
    unit_w_ptr,  # (), fp32
    scale_ptr,  # (), fp32: of A
    amax_ptr,  # (), int32: the bits of a float32
    D,
    F,
    E,
    stride_xt,
    FP8: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Compute A = relu(x·W_upᵀ)² with gathered rows of x; with FP8 cast it."""
    columns = tl.cdiv(F, BLOCK_N)
    tile, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    expert, start, end = find_tile(offset_ptr, tile_end_ptr, tile, E, BLOCK_M, BLOCK_E)
    if expert < E:
        rows = start + tl.arange(0, BLOCK_M)
        tokens = tl.load(token_ptr + rows, mask=rows < end, other=0)
        x_rows = x_ptr + tokens.to(tl.int64)[:, None] * stride_xt
        accumulator = gathered_expert_dot(
            x_rows, w_desc, expert, column, D, F, TRANSPOSED=False, EVEN=EVEN_D,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        if FP8:
            accumulator *= tl.load(unit_x_ptr) * tl.load(unit_w_ptr)
        hidden = tl.maximum(accumulator, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a NaN must reach the loss
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        place = tl.arange(0, BLOCK_M)[:, None] * F + n[None, :]
        mask = (rows < end)[:, None] & (n < F)[None, :]
        a_ptr += start.to(tl.int64) * F
        a = hidden * hidden
        if FP8:
            note_largest(amax_ptr, tl.where(mask, a, 0.0))
            tl.store(a_ptr + place, cast8(a, tl.load(scale_ptr), a_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(a_ptr + place, a.to(a_ptr.dtype.element_ty), mask=mask)


def moe_up(x: Tensor, w_up: Tensor, plan: Dispatch, fp8: Fp8 | None = None) -> Tensor:
    """Return A = relu(H)², (T·K, F), with rows sorted by expert, in the dtype of the operands."""
    (E, F, D), blocks = w_up.shape, launch_options(for_gpu(UP, x), x, w_up.shape[1])
    a = torch.empty(plan.order.numel(), F, dtype=x.dtype, device=x.device)
    launcher(_moe_up_kernel, (plan.tiles * cdiv(F, blocks["BLOCK_N"]),))(
        x,
        matrix_descriptor(w_up, blocks["BLOCK_N"], blocks["BLOCK_K"]),
        plan.token,
        plan.offset,
        plan.tile_end,
        a,
        *((fp8.unit, fp8.unit_w, fp8.scale, fp8.amax.view(torch.int32)) if fp8 else (None,) * 4),
        D,
        F,
        E,
        x.stride(0),
        FP8=fp8 is not None,
        EVEN_D=D % blocks["BLOCK_K"] == 0,
        BLOCK_E=block_e(E),
        **blocks,
    )
    return a


def moe_triton(
    x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, expert_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute what `moe_reference` does, in float16 or bfloat16, for D and F in multiples of 16."""
    T, K = expert_ids.shape
    if not T:
        return x.new_empty(x.shape), x.new_empty(0, w_up.shape[1])
    w_up, w_down = w_up.contiguous(), w_down.contiguous()
    if T * K <= FEW:
        return moe_few_triton(x, w_up, w_down, expert_ids, expert_weights)
    plan = dispatch(expert_ids, w_up.shape[0])
    a = moe_up(x, w_up, plan)
    parts = moe_grouped_gemm(a, w_down, plan, expert_weights.contiguous())
    return moe_combine(parts, plan.row, T, K), a
