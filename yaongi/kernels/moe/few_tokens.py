"""The squared-ReLU experts' forward for few tokens, as in generation: bound by reading each chosen expert once.

With at most FEW routed pairs every program can read all ids, so no dispatch runs before: a program finds its expert's
pairs by itself, and gathers their rows. The results have the layout of the stages for many tokens.

up         A = relu(H)² of the rows sorted by expert, and the two permutations        (T, D) → (T·K, F)
down       the rows of A by their expert, times the expert weight                     (T·K, F) → (T·K, D)
combine    as for many tokens                                                         (T·K, D) → (T, D)
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.early_launch import early_launch, let_next_start, wait_for_previous
from yaongi.kernels.common.few_rows import few_rows_dot
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv, next_power_of_2
from yaongi.kernels.moe.dispatch import moe_combine

Tensor = torch.Tensor

FEW = 512  # routed pairs, T·K


@dataclass(frozen=True)
class Config:
    """A tile's rows and columns, the inner elements that are loaded at a time, and launch options."""

    rows: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By routed pairs: up to 48 few experts are chosen, each by few tokens, and small tiles bring enough programs.
UP = {48: Config(8, 16, 256, 1, 4), FEW: Config(16, 64, 128, 4, 4)}
DOWN = {48: Config(8, 32, 256, 2, 3), FEW: Config(16, 128, 128, 4, 3)}


@triton.jit
def _find_work(
    ids_ptr, pairs, E, width, BY_EXPERT: tl.constexpr, EARLY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return all pairs and their experts (−1 for none), and this program's expert, its first row, its rows and columns.

    A slot is an expert, or a pair: then the first pair of an expert does the work for all of them. Where there is
    nothing to do, the number of rows is 0.
    """
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    blocks = tl.cdiv(width, BLOCK_N)
    slot, n = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    ids = tl.load(ids_ptr + p, mask=p < pairs, other=-1)
    ids = tl.where(ids < E, ids, -1)
    if BY_EXPERT:
        expert, earlier = slot, 0
    else:
        expert = tl.sum(tl.where(p == slot, ids, 0))
        earlier = tl.sum(((ids == expert) & (p < slot)).to(tl.int32))
    count = tl.sum((ids == expert).to(tl.int32))
    start = tl.sum(((ids >= 0) & (ids < expert)).to(tl.int32))
    return p, ids, expert, start, tl.where((expert >= 0) & (earlier == 0), count, 0), n


@triton.jit
def _moe_few_up_kernel(
    x_ptr,  # (T, D)
    w_ptr,  # (E, F, D)
    ids_ptr,  # (T·K)
    order_ptr,  # (T·K): the pair of each row
    row_ptr,  # (T·K): the row of each pair, −1 for a pair with a bad id
    a_ptr,  # (T·K, F)
    pairs,
    K,
    D,
    F,
    E,
    stride_xt,
    BY_EXPERT: tl.constexpr,
    EARLY: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute A = relu(x·W_upᵀ)² of an expert's pairs, in rows sorted by expert."""
    p, ids, expert, start, count, n = _find_work(ids_ptr, pairs, E, F, BY_EXPERT, EARLY, BLOCK_P, BLOCK_N)
    if tl.program_id(0) == 0:
        tl.store(row_ptr + p, -1, mask=(ids < 0) & (p < pairs))
    if count > 0:
        mine = ids == expert
        rows = start + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(row_ptr + p, rows, mask=mine)  # the programs of all columns store the same
        tl.store(order_ptr + rows, p, mask=mine)
        tl.debug_barrier()
        for first in range(0, count, ROWS):
            r = first + tl.arange(0, ROWS)
            known = r < count
            tokens = tl.load(order_ptr + start + r, mask=known, other=0) // K
            x_rows = x_ptr + tokens.to(tl.int64)[:, None] * stride_xt
            w_expert = w_ptr + expert.to(tl.int64) * F * D
            hidden = few_rows_dot(x_rows, known[:, None], w_expert, n[:, None], D, F, EVEN, BLOCK_K)
            hidden = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a NaN must reach the loss
            a = (hidden * hidden).to(a_ptr.dtype.element_ty)
            tl.store(a_ptr + (start + r)[None, :] * F + n[:, None], a, mask=known[None, :] & (n < F)[:, None])


@triton.jit
def _moe_few_down_kernel(
    a_ptr,  # (T·K, F)
    w_ptr,  # (E, D, F)
    ids_ptr,  # (T·K)
    order_ptr,  # (T·K)
    weight_ptr,  # (T·K), by pair
    part_ptr,  # (T·K, D)
    pairs,
    F,
    D,
    E,
    BY_EXPERT: tl.constexpr,
    EARLY: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute g·A·W_downᵀ of an expert's rows."""
    _, _, expert, start, count, n = _find_work(ids_ptr, pairs, E, D, BY_EXPERT, EARLY, BLOCK_P, BLOCK_N)
    for first in range(0, count, ROWS):
        r = first + tl.arange(0, ROWS)
        known = r < count
        w_expert = w_ptr + expert.to(tl.int64) * D * F
        a_rows = a_ptr + (start + r)[:, None] * F
        part = few_rows_dot(a_rows, known[:, None], w_expert, n[:, None], F, D, EVEN, BLOCK_K)
        of_rows = tl.load(order_ptr + start + r, mask=known, other=0)
        part *= tl.load(weight_ptr + of_rows, mask=known, other=0.0)[None, :]
        place = (start + r)[None, :] * D + n[:, None]
        tl.store(part_ptr + place, part.to(part_ptr.dtype.element_ty), mask=known[None, :] & (n < D)[:, None])


def _launch_options(table: dict[int, Config], pairs: int, inner: int, width: int) -> dict[str, int | bool]:
    """Return the constants and options of a launch over matrices (width, inner)."""
    config = next(config for most, config in table.items() if pairs <= most)
    block_n = min(config.block_n, max(16, next_power_of_2(width)))
    block_k = min(config.block_k, max(16, next_power_of_2(inner)))
    return {
        "EVEN": inner % block_k == 0 and width % block_n == 0,
        "ROWS": config.rows,
        "BLOCK_P": max(16, next_power_of_2(pairs)),
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def moe_few_triton(
    x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, expert_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute what `moe_reference` does, for 1 to FEW routed pairs and contiguous weights."""
    (T, K), (E, F, D), pairs = expert_ids.shape, w_up.shape, expert_ids.numel()
    order, row = (torch.empty(pairs, dtype=torch.int32, device=x.device) for _ in range(2))
    a, parts = (torch.empty(pairs, n, dtype=x.dtype, device=x.device) for n in (F, D))
    ids, slots = expert_ids.contiguous(), min(pairs, E)
    by_expert = pairs >= E
    early, up, down = early_launch(x), _launch_options(UP, pairs, D, F), _launch_options(DOWN, pairs, F, D)
    launcher(_moe_few_up_kernel, (slots * cdiv(F, up["BLOCK_N"]),))(
        x, w_up, ids, order, row, a, pairs, K, D, F, E, x.stride(0), BY_EXPERT=by_expert, **early, **up
    )
    launcher(_moe_few_down_kernel, (slots * cdiv(D, down["BLOCK_N"]),))(
        a, w_down, ids, order, expert_weights.contiguous(), parts, pairs, F, D, E, BY_EXPERT=by_expert, **early, **down
    )
    return moe_combine(parts, row, T, K, early=True), a
