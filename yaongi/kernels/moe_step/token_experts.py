"""`moe_step` in Triton: two kernels that read the weights of a token's experts once, all loads of a program together.

up         A = relu(W·x)² of all rows of the token's experts and of the shared one     (T, D) → (T, K·F + S)
down       the sum over the experts, weighted, and the shared one                      (T, K·F + S) → (T, D)
"""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.early_launch import early_launch, let_next_start, wait_for_previous
from yaongi.kernels.common.few_rows import RowTile
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv

Tensor = torch.Tensor

UP = RowTile(block_n=4, block_k=2048, num_warps=4)
DOWN = RowTile(block_n=8, block_k=512, num_warps=8)


@triton.jit
def _moe_step_up_kernel(
    x_ptr,  # (T, D)
    w_ptr,  # (E, F, D)
    shared_ptr,  # (S, D)
    ids_ptr,  # (T, K)
    a_ptr,  # (T, K·F + S)
    D,
    F,
    S,
    E,
    stride_x,
    SETTLED: tl.constexpr,
    EARLY: tl.constexpr,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute A for some rows of one expert; the shared one's programs come first, for they need no id."""
    let_next_start(EARLY)
    token, first, blocks = tl.program_id(1).to(tl.int64), tl.cdiv(S, BLOCK_N), tl.cdiv(F, BLOCK_N)
    of_shared, routed = tl.program_id(0) < first, tl.program_id(0) - first
    slot = tl.where(of_shared, K, routed // blocks)
    n = tl.where(of_shared, tl.program_id(0), routed % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, inside = tl.arange(0, BLOCK_K), n < tl.where(of_shared, S, F)
    rows = n.to(tl.int64)[:, None] * D + k[None, :]
    if not SETTLED:
        wait_for_previous(EARLY)
    w = tl.load(shared_ptr + rows, mask=(inside & of_shared)[:, None] & (k < D)[None, :], other=0.0)
    if SETTLED:
        wait_for_previous(EARLY)
    expert = tl.load(ids_ptr + token * K + slot, mask=slot < K, other=-1)
    chosen = inside & (expert >= 0) & (expert < E)
    w_ptrs = w_ptr + expert.to(tl.int64) * F * D + rows
    w = tl.load(w_ptrs, mask=chosen[:, None] & (k < D)[None, :], other=w)
    x_ptr += token * stride_x
    products = w.to(tl.float32) * tl.load(x_ptr + k, mask=k < D, other=0.0).to(tl.float32)[None, :]
    if of_shared:
        chosen, w_ptrs = inside, shared_ptr + rows
    for step in range(1, STEPS):
        i = step * BLOCK_K + k
        w = tl.load(w_ptrs + step * BLOCK_K, mask=chosen[:, None] & (i < D)[None, :], other=0.0)
        products += w.to(tl.float32) * tl.load(x_ptr + i, mask=i < D, other=0.0).to(tl.float32)[None, :]
    hidden = tl.maximum(tl.sum(products, axis=1), 0.0, propagate_nan=tl.PropagateNan.ALL)  # a NaN must be seen
    place = token * (K * F + S) + slot * F + n
    tl.store(a_ptr + place, (hidden * hidden).to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _moe_step_down_kernel(
    a_ptr,  # (T, K·F + S)
    w_ptr,  # (E, D, F)
    shared_ptr,  # (D, S)
    ids_ptr,  # (T, K)
    weight_ptr,  # (T, K)
    y_ptr,  # (T, D)
    D,
    F,
    S,
    E,
    SETTLED: tl.constexpr,
    EARLY: tl.constexpr,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    SHARED_STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute some elements of y: the shared expert's part, then that of each routed one."""
    let_next_start(EARLY)
    token, n, k = (
        tl.program_id(1).to(tl.int64),
        tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N),
        tl.arange(0, BLOCK_K),
    )
    known, n_wide = (n < D)[:, None], n.to(tl.int64)[:, None]
    shared_ptrs = shared_ptr + n_wide * S + k[None, :]
    if not SETTLED:
        wait_for_previous(EARLY)
    w = tl.load(shared_ptrs, mask=known & (k < S)[None, :], other=0.0)
    if SETTLED:
        wait_for_previous(EARLY)
    a_ptr += token * (K * F + S)
    products = w.to(tl.float32) * tl.load(a_ptr + K * F + k, mask=k < S, other=0.0).to(tl.float32)[None, :]
    for step in tl.static_range(1, SHARED_STEPS):
        i = step * BLOCK_K + k
        w = tl.load(shared_ptrs + step * BLOCK_K, mask=known & (i < S)[None, :], other=0.0)
        products += w.to(tl.float32) * tl.load(a_ptr + K * F + i, mask=i < S, other=0.0).to(tl.float32)[None, :]
    for slot in tl.static_range(K):
        expert = tl.load(ids_ptr + token * K + slot)
        chosen = (expert >= 0) & (expert < E)
        weight = tl.load(weight_ptr + token * K + slot, mask=chosen, other=0.0)
        w_ptrs = w_ptr + expert.to(tl.int64) * D * F + n_wide * F + k[None, :]
        for step in tl.static_range(STEPS):
            i = step * BLOCK_K + k
            mask = (i < F) & chosen
            w = tl.load(w_ptrs + step * BLOCK_K, mask=known & mask[None, :], other=0.0)
            a = tl.load(a_ptr + slot * F + i, mask=mask, other=0.0).to(tl.float32)
            products += w.to(tl.float32) * (weight * a)[None, :]
    tl.store(y_ptr + token * D + n, tl.sum(products, axis=1).to(y_ptr.dtype.element_ty), mask=n < D)


def moe_step_triton(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    settled: bool,
) -> Tensor:
    """Compute what `moe_step_reference` does, for few tokens in float16 or bfloat16."""
    (T, K), (E, F, D), S = expert_ids.shape, w_up.shape, shared_up.shape[0]
    y, a = (torch.empty(T, n, dtype=x.dtype, device=x.device) for n in (D, K * F + S))
    if not y.numel():
        return y
    settled = settled and shared_up.is_contiguous() and shared_down.is_contiguous()
    ids, options = expert_ids.contiguous(), {"SETTLED": settled, "K": K} | early_launch(x)
    block_k = UP.inner(D)
    launcher(_moe_step_up_kernel, (cdiv(S, UP.block_n) + K * cdiv(F, UP.block_n), T))(
        x,
        w_up.contiguous(),
        shared_up.contiguous(),
        ids,
        a,
        D,
        F,
        S,
        E,
        x.stride(0),
        STEPS=cdiv(D, block_k),
        BLOCK_N=UP.block_n,
        BLOCK_K=block_k,
        num_warps=UP.num_warps,
        **options,
    )
    block_k = DOWN.inner(max(F, S))
    launcher(_moe_step_down_kernel, (cdiv(D, DOWN.block_n), T))(
        a,
        w_down.contiguous(),
        shared_down.contiguous(),
        ids,
        expert_weights.contiguous(),
        y,
        D,
        F,
        S,
        E,
        STEPS=cdiv(F, block_k),
        SHARED_STEPS=cdiv(S, block_k),
        BLOCK_N=DOWN.block_n,
        BLOCK_K=block_k,
        num_warps=DOWN.num_warps,
        **options,
    )
    return y
