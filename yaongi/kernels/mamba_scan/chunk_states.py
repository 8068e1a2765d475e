"""The state at each chunk's entry in the Mamba-2 scan, carried along the sequence, forwards or backwards.

states   walks along the sequence with the state in registers                                   one launch
chain    if few heads would leave the GPU idle: each segment's entry state, from their totals   two launches before it
"""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.descriptors import descriptor
from yaongi.kernels.common.generations import for_gpu
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv, next_power_of_2
from yaongi.kernels.mamba_scan.decays import PLANES, Scan, exp2, load_into, load_out, load_through, row_descriptor
from yaongi.kernels.mamba_scan.isolation import (
    ISOLATING,
    any_not_finite,
    broken_rows,
    flags_for,
    kept,
    kept_rows,
    launches_for,
    load_documents,
    lost_at,
    lost_tokens,
    not_finite,
    program,
)
from yaongi.kernels.mamba_scan.tiles import (
    Config,
    by_head,
    load_state,
    load_tile,
    state_block,
    state_descriptor,
    store_state,
)

Tensor = torch.Tensor

# By GPU generation and bytes per element. On generation 10 Triton 3.6 fails to compile more than one stage.
STATES = {
    8: {2: Config(num_warps=8, num_stages=2), 4: Config(num_warps=8, num_stages=1)},
    9: {2: Config(num_warps=4, num_stages=3), 4: Config(num_warps=8, num_stages=1)},
    10: {2: Config(num_warps=4, num_stages=1), 4: Config(num_warps=8, num_stages=1)},
    12: {2: Config(num_warps=8, num_stages=1), 4: Config(num_warps=8, num_stages=1)},
}


@triton.jit
def _mamba_scan_states_kernel(
    x_desc,  # x (B, H, L, P); dy in reverse
    b_desc,  # b (B, G, L, N); c in reverse
    steps_desc,  # (B·H·4, padded)
    steps_ptr,
    document_ptr,  # (B, L)
    flags_ptr,  # (programs): isolation.py
    entry_desc,  # (S·B·H, P, N), fp32: the state at each segment's start
    states_desc,  # (B·H·chunks, N, P): the state at each chunk's entry; in reverse, the gradient at its end
    end_desc,  # fp32: with TOTALS segments' totals, (S·B·H, P, N), else the last state, (B·H, P, N)
    L,
    H,
    P,
    padded,
    heads_per_group,
    chunks,
    chunks_per_segment,
    TOTALS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    ISOLATE: tl.constexpr,
    HAS_ENTRY: tl.constexpr,
    HAS_END: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Walk h ← t·h + Σ_j o_j·δ_j·x_j ⊗ b_j, or in reverse g ← t·g + Σ_i e_i·dy_i ⊗ c_i, both transposed: (N, P)."""
    blocks_p = tl.cdiv(P, BLOCK_P)
    row, column = tl.program_id(0) // blocks_p, (tl.program_id(0) % blocks_p) * BLOCK_P
    batch, head, segment = row // H, row % H, tl.program_id(1)
    if ISOLATE and tl.load(flags_ptr + program()) == 0:
        return
    if TOTALS and REVERSE:
        segment += 1  # no total is needed of the walk's last segment, in reverse segment 0
    segment_row = segment * (tl.num_programs(0) // blocks_p) + row
    steps_ptr += row.to(tl.int64) * PLANES * padded
    state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if HAS_ENTRY:
        state = load_state(entry_desc, segment_row, column, BLOCK_P, BLOCK_N)
    if ISOLATE:
        state_lost = any_not_finite(state)
        state = kept(state, state_lost)
    first = segment * chunks_per_segment
    end = tl.minimum(first + chunks_per_segment, chunks)
    for i in tl.range(first, end, disable_licm=True):
        chunk = first + end - 1 - i if REVERSE else i
        if not TOTALS:
            stored = tl.where(state_lost != 0, float("nan"), state) if ISOLATE else state
            tile = stored.to(states_desc.dtype).reshape(1, BLOCK_N, BLOCK_P)
            states_desc.store([row * chunks + chunk, 0, column], tile)
        start = chunk * CHUNK
        x = load_tile(x_desc, batch, start, head, column, CHUNK, BLOCK_P)
        b = load_tile(b_desc, batch, start, head // heads_per_group, 0, CHUNK, BLOCK_N)
        if REVERSE:
            weight = load_into(steps_desc, row, start, CHUNK)
        else:
            weight = load_out(steps_desc, row, start, CHUNK)
        through = load_through(steps_ptr, start, CHUNK)
        if ISOLATE:
            documents, before, last = load_documents(document_ptr, batch, start, L, CHUNK)
            broken = broken_rows(x) | broken_rows(b) | not_finite(weight)
            lost = lost_tokens(broken, state_lost, documents, last if REVERSE else before)
            state_lost = lost_at(lost, documents, before if REVERSE else last)
            x, b, weight = kept_rows(x, lost), kept_rows(b, lost), kept(weight, lost)
            through = kept(through, state_lost | not_finite(through))
        weighted = x.to(tl.float32) * weight[:, None]
        rounded = weighted.to(x.dtype)
        state = tl.dot(b.T, rounded, state * through, input_precision="ieee")
        if x.dtype != tl.float32:  # add the rounding error, most of dA's error; memory-bound, so it is free
            state = tl.dot(b.T, (weighted - rounded.to(tl.float32)).to(x.dtype), state, input_precision="ieee")
    if ISOLATE:
        state = tl.where(state_lost != 0, float("nan"), state)
    elif HAS_DOCUMENTS:
        tl.store(flags_ptr + program(), any_not_finite(state))
    if TOTALS:
        store_state(end_desc, segment_row, column, state, BLOCK_P, BLOCK_N)
    elif HAS_END and segment == (0 if REVERSE else tl.num_programs(1) - 1):
        store_state(end_desc, row, column, state, BLOCK_P, BLOCK_N)


@triton.jit
def _mamba_scan_chain_kernel(
    totals_ptr,  # (S, B, H, P·N): each segment's own contribution, overwritten by the state at its start
    first_ptr,  # (B, H, P·N)
    steps_ptr,  # (B, H, 4, padded)
    size,
    padded,
    chunks_per_segment,
    segments,
    HAS_FIRST: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    i, z = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_Z)
    place = row.to(tl.int64) * size + i
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_FIRST:
        state = tl.load(first_ptr + place, mask=i < size, other=0.0)
    steps_ptr += row.to(tl.int64) * PLANES * padded
    for k in range(segments):
        segment = segments - 1 - k if REVERSE else k
        start = segment * chunks_per_segment * CHUNK
        ends = start + z * CHUNK + (CHUNK - 1)
        inside = (z < chunks_per_segment) & (ends < padded)
        through = exp2(tl.sum(tl.load(steps_ptr + ends, mask=inside, other=0.0)))  # if NaN, so is the total
        segment_ptr = totals_ptr + segment.to(tl.int64) * tl.num_programs(0) * size + place
        total = tl.load(segment_ptr, mask=(i < size) & (k < segments - 1), other=0.0)
        tl.store(segment_ptr, state, mask=i < size)
        state = tl.where(through > 0, state * through, 0.0) + total


def walk(
    scan: Scan,
    x: Tensor,
    b: Tensor,
    entry: Tensor | None,
    states: Tensor | None,
    end: Tensor | None,
    reverse: bool,
    flagged: Tensor | None = None,
) -> None:
    """Launch the states kernel; without `states` it writes the totals of all segments but the walk's last to `end`.

    With `flagged` only those programs walk, and isolate what is not finite.
    """
    (B, _, H, P), (G, N) = x.shape, b.shape[2:]
    block_p, block_n = state_block(x, N)
    segments = scan.segments - (states is None)
    grid = (B * H * cdiv(P, block_p), segments)
    flags = flags_for(scan.document_ids, grid[0] * grid[1], x) if flagged is None else flagged
    for isolate in launches_for(flags) if flagged is None else (True,):
        config = ISOLATING if isolate else for_gpu(STATES, x)[x.element_size()]
        launcher(_mamba_scan_states_kernel, grid)(
            by_head(x, scan.chunk, block_p),
            by_head(b, scan.chunk, block_n),
            row_descriptor(scan),
            scan.steps,
            scan.document_ids,
            flags,
            state_descriptor(entry, block_p, block_n),
            None if states is None else descriptor(states, block_n, block_p),
            state_descriptor(end, block_p, block_n),
            scan.length,
            H,
            P,
            scan.padded,
            H // G,
            scan.chunks,
            scan.chunks_per_segment,
            TOTALS=states is None,
            HAS_DOCUMENTS=flags is not None,
            ISOLATE=isolate,
            HAS_ENTRY=entry is not None,
            HAS_END=end is not None,
            REVERSE=reverse,
            CHUNK=scan.chunk,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def segment_entries(scan: Scan, x: Tensor, b: Tensor, first: Tensor | None, *, reverse: bool = False) -> Tensor | None:
    """Return the state at each segment's start, (S, B, H, P, N); with one segment that is `first`."""
    if scan.segments == 1:
        return first
    (B, _, H, P), N = x.shape, b.shape[3]
    totals = torch.empty(scan.segments, B, H, P, N, dtype=torch.float32, device=x.device)
    walk(scan, x, b, None, None, totals, reverse)
    launcher(_mamba_scan_chain_kernel, (B * H, cdiv(P * N, 1024)))(
        totals,
        first,
        scan.steps,
        P * N,
        scan.padded,
        scan.chunks_per_segment,
        scan.segments,
        HAS_FIRST=first is not None,
        REVERSE=reverse,
        CHUNK=scan.chunk,
        BLOCK_Z=next_power_of_2(scan.chunks_per_segment),
        BLOCK=1024,
    )
    return totals


def scan_states(
    scan: Scan, x: Tensor, b: Tensor, first: Tensor | None, end: Tensor | None, *, reverse: bool = False
) -> Tensor:
    """Return the state at each chunk's entry, (B·H·chunks, N, P) in x's dtype; the walk's last state goes to `end`.

    In reverse, return the gradient of the state at each chunk's end; x is dy, b is c, `first` dfinal_state.
    """
    B, _, H, P = x.shape
    states = torch.empty(B * H * scan.chunks, b.shape[3], P, dtype=x.dtype, device=x.device)
    walk(scan, x, b, segment_entries(scan, x, b, first, reverse=reverse), states, end, reverse)
    return states
