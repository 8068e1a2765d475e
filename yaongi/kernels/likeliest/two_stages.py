"""`likeliest` in Triton: the likeliest token of each part of a row, then of the row.

A token is an int64: its logit's rank in the upper half, and below it how far its id is from the largest int32. So of
equal logits the smallest id is the largest number.
"""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.early_launch import early_launch, let_next_start, wait_for_previous
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.ranks import rank
from yaongi.kernels.common.sizes import cdiv, next_power_of_2

Tensor = torch.Tensor

PART = 1024  # logits of a program
LARGEST = tl.constexpr(2**31 - 1)
NOTHING = tl.constexpr(-(2**63))  # below every token


@triton.jit
def _parts_likeliest_kernel(
    logits_ptr,  # (B, V), unit stride along V
    best_ptr,  # (B, parts)
    V,
    parts,
    stride,
    EARLY: tl.constexpr,
    PART: tl.constexpr,
):
    """Store the likeliest token of one part of a row."""
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    v = part * PART + tl.arange(0, PART)
    logits = tl.load(logits_ptr + row * stride + v, mask=v < V, other=0.0).to(tl.float32)
    tokens = (rank(logits).to(tl.int64) << 32) + (LARGEST - v)
    tl.store(best_ptr + row * parts + part, tl.max(tl.where(v < V, tokens, NOTHING), axis=0))


@triton.jit
def _likeliest_kernel(
    best_ptr,  # (B, parts)
    ids_ptr,  # (B)
    parts,
    EARLY: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Store the id of a row's likeliest token, −1 where its logit is not finite."""
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    best = tl.max(tl.load(best_ptr + row * parts + part, mask=part < parts, other=NOTHING), axis=0)
    highest, infinity = (best >> 32).to(tl.int32), tl.full((), float("inf"), tl.float32)
    finite = (rank(-infinity) < highest) & (highest < rank(infinity))
    tl.store(ids_ptr + row, tl.where(finite, LARGEST - (best & 0xFFFFFFFF), -1))


def likeliest_triton(logits: Tensor) -> Tensor:
    """Compute what `likeliest_reference` does, for floats of up to 32 bits."""
    B, V = logits.shape
    ids, parts = torch.empty(B, dtype=torch.int64, device=logits.device), cdiv(V, PART)
    if not B:
        return ids
    best, early = torch.empty(B, parts, dtype=torch.int64, device=logits.device), early_launch(logits)
    launcher(_parts_likeliest_kernel, (B * parts,))(
        logits, best, V, parts, logits.stride(0), **early, PART=PART, num_warps=4
    )
    launcher(_likeliest_kernel, (B,))(best, ids, parts, **early, PARTS=next_power_of_2(parts), num_warps=1)
    return ids
