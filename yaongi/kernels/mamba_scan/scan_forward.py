"""The Mamba-2 scan's forward in Triton: the output in one walk along the sequence.

    steps      step sizes and decays, in one launch                                             decays.py
    output     each program walks along one head's sequence: scores, decay, output, next state; no state is stored

Names for README.md's symbols: `scores` K = c·bᵀ, `into` e, `through` t, `decay` E∘δ. The backward: scan_backward.py.
"""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.generations import for_gpu
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv
from yaongi.kernels.mamba_scan.chunk_states import segment_entries
from yaongi.kernels.mamba_scan.decays import (
    PLANES,
    load_decays,
    load_into,
    load_out,
    load_through,
    row_descriptor,
    scan_decays,
)
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
    marked_rows,
    not_finite,
    program,
)
from yaongi.kernels.mamba_scan.tiles import (
    Config,
    by_head,
    load_state,
    load_tile,
    scaled,
    state_block,
    state_descriptor,
    store_state,
    store_tile,
)

Tensor = torch.Tensor

# By GPU generation and bytes per element; Hopper's 2-byte options found on an H100 at 8 × 4096, 64 heads, 2026-11-24
# (docs/LAB.md).
OUTPUT = {
    8: {2: Config(num_warps=8, num_stages=2), 4: Config(num_warps=8, num_stages=1)},
    9: {2: Config(num_warps=4, num_stages=2), 4: Config(num_warps=8, num_stages=1)},
    12: {2: Config(num_warps=8, num_stages=1), 4: Config(num_warps=8, num_stages=1)},
}
WIDE_OUTPUT = OUTPUT | {9: OUTPUT[9] | {2: Config(num_warps=8, num_stages=2)}}  # N > 128: four warps would spill


@triton.jit
def _mamba_scan_output_kernel(
    x_desc,  # (B, H, L, P)
    b_desc,  # (B, G, L, N)
    c_desc,  # (B, G, L, N)
    steps_desc,  # (B·H·4, padded)
    steps_ptr,
    document_ptr,  # (B, L)
    flags_ptr,  # (programs): isolation.py
    D_ptr,  # (H)
    entry_desc,  # (S·B·H, P, N), fp32
    y_desc,  # (B, H, L, P)
    final_desc,  # (B·H, P, N), fp32
    L,
    H,
    P,
    padded,
    heads_per_group,
    chunks_per_segment,
    HAS_D: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    ISOLATE: tl.constexpr,
    HAS_ENTRY: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute y = (K ∘ E ∘ δ)·x + e·(c·hᵀ) + D·x and h ← t·h + Σ_j o_j·δ_j·x_j ⊗ b_j, chunk after chunk."""
    blocks_p = tl.cdiv(P, BLOCK_P)
    row, column = tl.program_id(0) // blocks_p, (tl.program_id(0) % blocks_p) * BLOCK_P
    batch, head, segment = row // H, row % H, tl.program_id(1)
    group = head // heads_per_group
    if ISOLATE and tl.load(flags_ptr + program()) == 0:
        return
    steps_ptr += row.to(tl.int64) * PLANES * padded
    state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)  # transposed
    if HAS_ENTRY:
        segment_row = segment * (tl.num_programs(0) // blocks_p) + row
        state = load_state(entry_desc, segment_row, column, BLOCK_P, BLOCK_N)
    if ISOLATE:
        state_lost = any_not_finite(state)
        state = kept(state, state_lost)
    if HAS_D:
        D = tl.load(D_ptr + head).to(tl.float32)
    first = segment * chunks_per_segment
    end = tl.minimum(first + chunks_per_segment, tl.cdiv(L, CHUNK))
    for chunk in tl.range(first, end, disable_licm=True):
        start = chunk * CHUNK
        x = load_tile(x_desc, batch, start, head, column, CHUNK, BLOCK_P)
        b = load_tile(b_desc, batch, start, group, 0, CHUNK, BLOCK_N)
        c = load_tile(c_desc, batch, start, group, 0, CHUNK, BLOCK_N)
        into = load_into(steps_desc, row, start, CHUNK)
        if ISOLATE:
            documents, before, last = load_documents(document_ptr, batch, start, L, CHUNK)
            broken = broken_rows(x) | broken_rows(b) | not_finite(load_out(steps_desc, row, start, CHUNK))
            lost = lost_tokens(broken, state_lost, documents, before)
            x, b, into = kept_rows(x, lost), kept_rows(b, lost), kept(into, lost)
        y = tl.dot(c, state.to(x.dtype), input_precision="ieee") * into[:, None]
        scores = tl.dot(c, b.T, input_precision="ieee")
        mixing = scores * load_decays(steps_desc, row, start, CHUNK)
        if ISOLATE:
            mixing = kept(mixing, lost[:, None] | lost[None, :])
        y = tl.dot(mixing.to(x.dtype), x, y, input_precision="ieee")
        if HAS_D:
            y += D * x.to(tl.float32)
        if ISOLATE:
            y = marked_rows(y, lost)
        store_tile(y_desc, batch, start, head, column, y, CHUNK, BLOCK_P)
        out = load_out(steps_desc, row, start, CHUNK)
        through = load_through(steps_ptr, start, CHUNK)
        if ISOLATE:
            out = kept(out, lost)
            state_lost = lost_at(lost, documents, last)
            through = kept(through, state_lost)
        state = tl.dot(b.T, scaled(x, out), state * through, input_precision="ieee")
    if ISOLATE:
        state = tl.where(state_lost != 0, float("nan"), state)
    elif HAS_DOCUMENTS:
        tl.store(flags_ptr + program(), any_not_finite(state))
    if HAS_FINAL and segment == tl.num_programs(1) - 1:
        store_state(final_desc, row, column, state, BLOCK_P, BLOCK_N)


def mamba_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """Compute what `mamba_scan_reference` does, for P and N in multiples of 8."""
    (B, L, H, P), (G, N) = x.shape, b.shape[2:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty((B, H, P, N) if return_final_state else 0, dtype=torch.float32, device=x.device)
    if not x.numel():
        return y, final
    scan = scan_decays(x, dt, A, dt_bias, document_ids)
    first = None if initial_state is None else initial_state.contiguous()
    entry = segment_entries(scan, x, b, first)
    block_p, block_n = state_block(x, N)
    grid = (B * H * cdiv(P, block_p), scan.segments)
    flags = flags_for(document_ids, grid[0] * grid[1], x)
    for isolate in launches_for(flags):
        config = ISOLATING if isolate else for_gpu(OUTPUT if block_n <= 128 else WIDE_OUTPUT, x)[x.element_size()]
        launcher(_mamba_scan_output_kernel, grid)(
            by_head(x, scan.chunk, block_p),
            by_head(b, scan.chunk, block_n),
            by_head(c, scan.chunk, block_n),
            row_descriptor(scan),
            scan.steps,
            scan.document_ids,
            flags,
            None if D is None else D.contiguous(),
            state_descriptor(entry, block_p, block_n),
            by_head(y, scan.chunk, block_p),
            state_descriptor(final if return_final_state else None, block_p, block_n),
            L,
            H,
            P,
            scan.padded,
            H // G,
            scan.chunks_per_segment,
            HAS_D=D is not None,
            HAS_DOCUMENTS=flags is not None,
            ISOLATE=isolate,
            HAS_ENTRY=entry is not None,
            HAS_FINAL=return_final_state,
            CHUNK=scan.chunk,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y, final
