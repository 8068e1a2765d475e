"""The Mamba-2 scan's backward in Triton: the gradients of each chunk from stored states.

    states     the state h at each chunk's entry, then, walking backwards, the gradient g' of the state at its end;
               both rounded to x's dtype                                                        chunk_states.py
    gradients  each program takes one chunk of one group and loops over the group's heads: db and dc are summed over
               the heads in its registers
    steps'     the gradients of the exponents, summed along each chunk, give those of dt, A and dt_bias

The heads are processed in slices, so that the states of all heads never exist at once. Names for README.md's symbols:
`scores` K = c·bᵀ, `into` e, `out` o·δ, `through` t, `decay` E∘δ. Sums have a fixed order: results are reproducible.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.descriptors import descriptor
from yaongi.kernels.common.generations import for_gpu
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv
from yaongi.kernels.mamba_scan.chunk_states import scan_states
from yaongi.kernels.mamba_scan.decay_gradients import decay_gradients
from yaongi.kernels.mamba_scan.decays import (
    CHUNK,
    PLANES,
    Scan,
    load_decays,
    load_into,
    load_out,
    load_step,
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
    lost_tokens,
    marked_rows,
    not_finite,
    program,
    reached_by,
)
from yaongi.kernels.mamba_scan.tiles import Config, by_head, cut, load_tile, scaled, state_block, store_tile

Tensor = torch.Tensor
SliceGradients = Callable[..., tuple[Tensor, Tensor | None]]

# By GPU generation and bytes per element; Hopper's 2-byte options found on an H100 at 8 × 4096, 64 heads, 2026-11-24
# (docs/LAB.md).
ONE_STAGE = Config(num_warps=8, num_stages=1)
GRADIENTS = {
    8: {2: Config(num_warps=8, num_stages=2), 4: ONE_STAGE},
    9: {2: Config(num_warps=8, num_stages=3), 4: ONE_STAGE},
    12: {2: ONE_STAGE, 4: ONE_STAGE},
}
WIDE_GRADIENTS = {  # N > 128: a stage less fits
    8: {2: ONE_STAGE, 4: ONE_STAGE},
    9: {2: Config(num_warps=8, num_stages=2), 4: ONE_STAGE},
    12: {2: ONE_STAGE, 4: ONE_STAGE},
}
STATES_BYTES = 600e6  # most bytes of states and their gradients that a backward holds at a time


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def sum_rows(a, b, c, d):
    """Return the row sums of four tiles with a single exchange between warps."""
    return tl.reduce((a, b, c, d), 1, _add_four)


@triton.jit
def _add_projection(
    desc, batch, start, group, gradient, ACCUMULATE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store the gradient of a chunk of b or c, or add it to what other heads have stored."""
    if ACCUMULATE:
        gradient += load_tile(desc, batch, start, group, 0, CHUNK, BLOCK_N)
    store_tile(desc, batch, start, group, 0, gradient, CHUNK, BLOCK_N)


@triton.jit
def _mamba_scan_gradients_kernel(
    x_desc,  # (B, H, L, P)
    dy_desc,  # (B, H, L, P)
    b_desc,  # (B, G, L, N)
    c_desc,  # (B, G, L, N)
    states_desc,  # (B·H·chunks, N, P)
    dstates_desc,  # (B·H·chunks, N, P)
    steps_desc,  # (B·H·4, padded)
    steps_ptr,
    document_ptr,  # (B, L)
    flags_ptr,  # (programs): isolation.py
    D_ptr,  # (H)
    dx_desc,  # (B, H, L, P)
    db_desc,  # (B, G, L, N)
    dc_desc,  # (B, G, L, N)
    sums_ptr,  # (B, H, BLOCKS_P, padded, 4): x·du·δ, da_k's terms for tokens ≥ k, those for tokens < k, dy·x
    L,
    H,
    N,
    padded,
    heads_per_group,
    chunks,
    HAS_D: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    ISOLATE: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # add db and dc to the sums of other heads' launches, which are fp32
    CHUNK: tl.constexpr,
    BLOCKS_P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Process one chunk of one group, head after head; the diagonal's terms are computed separately, in fp32."""
    chunk, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = chunk * CHUNK
    if ISOLATE and tl.load(flags_ptr + program()) == 0:
        return
    if ISOLATE:
        documents, before, last = load_documents(document_ptr, batch, start, L, CHUNK)
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    # Without this loop of one iteration, Triton lays all warps along the rows of a product that feeds another one, and
    # each row is computed twice.
    for n in range(0, N, BLOCK_N):
        c = load_tile(c_desc, batch, start, group, n, CHUNK, BLOCK_N)
        b = load_tile(b_desc, batch, start, group, n, CHUNK, BLOCK_N)
        scores = tl.dot(c, b.T, scores, input_precision="ieee")
    b = load_tile(b_desc, batch, start, group, 0, CHUNK, BLOCK_N)
    c = load_tile(c_desc, batch, start, group, 0, CHUNK, BLOCK_N)
    if ISOLATE:
        lost_projections = reached_by(broken_rows(b) | broken_rows(c), documents)
        lost_in_group = lost_projections
        b, c = kept_rows(b, lost_projections), kept_rows(c, lost_projections)
        scores = kept(scores, lost_projections[:, None] | lost_projections[None, :])
    diagonal = tl.arange(0, CHUNK)[:, None] == tl.arange(0, CHUNK)[None, :]
    own_score = tl.sum(tl.where(diagonal, scores, 0.0), 1)
    scores = tl.where(diagonal, 0.0, scores)  # no decay is on the diagonal; its terms, maybe the largest, cancel in da
    db = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    dc = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    dscores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for k in tl.range(0, heads_per_group * BLOCKS_P, disable_licm=True):
        head, column = group * heads_per_group + k // BLOCKS_P, (k % BLOCKS_P) * BLOCK_P
        row = batch * H + head
        h = states_desc.load([row * chunks + chunk, 0, column]).reshape(BLOCK_N, BLOCK_P)
        g = dstates_desc.load([row * chunks + chunk, 0, column]).reshape(BLOCK_N, BLOCK_P)
        dy = load_tile(dy_desc, batch, start, head, column, CHUNK, BLOCK_P)
        x = load_tile(x_desc, batch, start, head, column, CHUNK, BLOCK_P)
        into, out = load_into(steps_desc, row, start, CHUNK), load_out(steps_desc, row, start, CHUNK)
        through = load_through(steps_ptr + row.to(tl.int64) * PLANES * padded, start, CHUNK)
        if ISOLATE:
            broken = broken_rows(x) | broken_rows(dy) | not_finite(into) | not_finite(out)
            h_lost, g_lost = any_not_finite(h), any_not_finite(g)
            lost = lost_tokens(broken, h_lost, documents, before) | lost_tokens(broken, g_lost, documents, last)
            lost |= lost_projections
            x, dy, into, out = kept_rows(x, lost), kept_rows(dy, lost), kept(into, lost), kept(out, lost)
            h, g, through = kept(h, h_lost), kept(g, g_lost), kept(through, h_lost | g_lost)
            lost_in_group |= lost
        passing = through * tl.sum(h.to(tl.float32) * g.to(tl.float32))
        products = tl.dot(dy, x.T, input_precision="ieee")
        # These two products aren't needed before the next head, so they overlap with the computation below.
        dc = tl.dot(scaled(dy, into), h.T, dc, input_precision="ieee")
        db = tl.dot(scaled(x, out), g.T, db, input_precision="ieee")
        decay = load_decays(steps_desc, row, start, CHUNK)
        if ISOLATE:
            decay = kept(decay, lost[:, None] | lost[None, :])
        dscore = decay * products
        dscores += dscore
        within = scores * dscore
        dexponent = tl.sum(within, 1) - tl.sum(within, 0)
        dx = tl.dot((scores * decay).to(x.dtype).T, dy, input_precision="ieee")
        y_entering = tl.dot(c, h, input_precision="ieee") * into[:, None]
        dx_leaving = tl.dot(b, g, input_precision="ieee") * out[:, None]
        x_wide, dy_wide = x.to(tl.float32), dy.to(tl.float32)
        entering, leaving, direct, skip = sum_rows(
            y_entering * dy_wide, x_wide * dx_leaving, x_wide * dx, x_wide * dy_wide
        )
        own_step = own_score * load_step(steps_desc, row, start, CHUNK)
        dexponent += entering + tl.where(tl.arange(0, CHUNK) == CHUNK - 1, passing, 0.0)
        direct += leaving + own_step * skip
        D = tl.load(D_ptr + head).to(tl.float32) if HAS_D else 0.0
        dx += dx_leaving + (own_step + D)[:, None] * dy_wide
        if ISOLATE:
            dx = marked_rows(dx, lost)
        store_tile(dx_desc, batch, start, head, column, dx, CHUNK, BLOCK_P)
        sums = tl.join(tl.join(direct, leaving), tl.join(dexponent, skip)).reshape(CHUNK, 4)
        if ISOLATE:
            sums = marked_rows(sums, lost)
        sums_row = sums_ptr + ((row * BLOCKS_P + k % BLOCKS_P).to(tl.int64) * padded + start) * 4
        tl.store(sums_row + tl.arange(0, CHUNK)[:, None] * 4 + tl.arange(0, 4)[None, :], sums)
    if HAS_DOCUMENTS and not ISOLATE:
        broken_sums = any_not_finite(scores + dscores) | any_not_finite(db + dc)
        tl.store(flags_ptr + program(), broken_sums)
        if ACCUMULATE and broken_sums != 0:  # the other heads' sums must stay as they are
            return
    narrow = dscores.to(b.dtype)
    dc = tl.dot(narrow, b, dc, input_precision="ieee")
    if ISOLATE:
        dc, db = marked_rows(dc, lost_in_group), marked_rows(db, lost_in_group)
    _add_projection(dc_desc, batch, start, group, dc, ACCUMULATE, CHUNK, BLOCK_N)
    db = tl.dot(narrow.T, c, db, input_precision="ieee")
    _add_projection(db_desc, batch, start, group, db, ACCUMULATE, CHUNK, BLOCK_N)


@dataclass(frozen=True)
class Gradients:
    """The tensors that a backward pass writes, or their slices for some heads."""

    dx: Tensor  # (B, L, H, P)
    ddt: Tensor  # (B, L, H)
    db: Tensor  # (B, L, G, N)
    dc: Tensor  # (B, L, G, N)
    accumulated: bool = False  # db and dc are fp32 sums over heads, and are added to


def scan_gradients(
    scan: Scan,
    out: Gradients,
    dy: Tensor,
    x: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    states: Tensor,
    dstates: Tensor,
    sums: Tensor,
    flagged: Tensor | None = None,
) -> None:
    """Write dx, db, dc and the sums along P, N and the chunk from which `decay_gradients` computes ddt.

    With `flagged` only those programs compute, and isolate what is not finite.
    """
    (B, _, H, _), (G, N) = x.shape, b.shape[2:]
    block_p, block_n = state_block(x, N)
    blocks_p = sums.shape[2]
    grid = (scan.chunks, G, B)
    flags = flags_for(scan.document_ids, math.prod(grid), x) if flagged is None else flagged
    for isolate in launches_for(flags) if flagged is None else (True,):
        config = ISOLATING if isolate else for_gpu(GRADIENTS if block_n <= 128 else WIDE_GRADIENTS, x)[x.element_size()]
        launcher(_mamba_scan_gradients_kernel, grid)(
            *(by_head(t, scan.chunk, block_p) for t in (x, dy)),
            *(by_head(t, scan.chunk, block_n) for t in (b, c)),
            *(descriptor(t, block_n, block_p) for t in (states, dstates)),
            row_descriptor(scan),
            scan.steps,
            scan.document_ids,
            flags,
            None if D is None else D.contiguous(),
            by_head(out.dx, scan.chunk, block_p),
            *(by_head(t, scan.chunk, block_n) for t in (out.db, out.dc)),
            sums,
            scan.length,
            H,
            N,
            scan.padded,
            H // G,
            scan.chunks,
            HAS_D=D is not None,
            HAS_DOCUMENTS=flags is not None,
            ISOLATE=isolate,
            ACCUMULATE=out.accumulated,
            CHUNK=scan.chunk,
            BLOCKS_P=blocks_p,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _slice_gradients(
    out: Gradients,
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    document_ids: Tensor | None,
    first: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Write the gradients of one slice of heads; return those of A, D and dt_bias, (3, H), and the initial state's."""
    dlast, first = (None if t is None else t.contiguous() for t in (dlast, first))
    dfirst = None if first is None else torch.empty_like(first)
    scan = scan_decays(x, dt, A, dt_bias, document_ids, backward=True)
    states = scan_states(scan, x, b, first, None)
    dstates = scan_states(scan, dy, c, dlast, dfirst, reverse=True)
    blocks_p = cdiv(x.shape[3], state_block(x, b.shape[3])[0])
    sums = torch.empty(*x.shape[:3:2], blocks_p, scan.padded, 4, dtype=torch.float32, device=x.device)
    scan_gradients(scan, out, dy, x, b, c, D, states, dstates, sums)
    return decay_gradients(scan, out.ddt, sums, dt, A, dt_bias, has_d=D is not None), dfirst


def slices_of(states_bytes: float, heads: int, groups: int) -> list[tuple[slice, slice]]:
    """Cut the heads into slices whose states take at most STATES_BYTES each, or into single heads.

    A slice is one or more complete groups, or, if one group is still too large, a part of one group's heads.

    Returns:
        For each slice its heads and its groups.
    """
    wanted, heads_per_group = states_bytes / STATES_BYTES, heads // groups
    cuts = next((n for n in range(1, groups) if groups % n == 0 and n >= wanted), groups)
    parts = next(
        (n for n in range(1, heads_per_group) if heads_per_group % n == 0 and n * cuts >= wanted), heads_per_group
    )
    parts = parts if cuts == groups else 1
    slices = []
    for i in range(cuts * parts):
        width, first_group = heads // (cuts * parts), (i // parts) * (groups // cuts)
        slices.append((slice(i * width, (i + 1) * width), slice(first_group, first_group + groups // cuts)))
    return slices


def bytes_of_states(x: Tensor, b: Tensor) -> float:
    """Return the bytes of a state per chunk, for all heads."""
    return x.numel() * b.shape[3] * x.element_size() / for_gpu(CHUNK, x)[x.element_size()]


def fill_gradients(
    out: Gradients,
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    of_slice: SliceGradients = _slice_gradients,
    slices: list[tuple[slice, slice]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write dx, ddt, db and dc, which TMA must be able to address; return dA, dD, ddt_bias and dinitial_state."""
    H, G = x.shape[2], b.shape[2]
    slices = slices or slices_of(2 * bytes_of_states(x, b), H, G)
    db, dc, in_parts = out.db, out.dc, len(slices) > G
    if in_parts:  # a group's sum over its heads comes from several launches: it stays in fp32 and is rounded once
        db, dc = (torch.zeros(b.shape, dtype=torch.float32, device=b.device) for _ in range(2))
    parameters, dfirsts = [], []
    for heads, groups in slices:
        found = of_slice(
            Gradients(cut(out.dx, heads), cut(out.ddt, heads), cut(db, groups), cut(dc, groups), in_parts),
            cut(dy, heads),
            cut(dfinal_state, heads, 1),
            cut(x, heads),
            cut(dt, heads),
            cut(A, heads, 0),
            cut(b, groups),
            cut(c, groups),
            cut(D, heads, 0),
            cut(dt_bias, heads, 0),
            document_ids,
            cut(initial_state, heads, 1),
        )
        parameters.append(found[0])
        dfirsts.append(found[1])
    if in_parts:
        out.db.copy_(db)
        out.dc.copy_(dc)
    dA, dD, ddt_bias = parameters[0] if len(slices) == 1 else torch.cat(parameters, dim=1)
    dD, ddt_bias = (x.new_empty(0) if t is None else d.to(t.dtype) for t, d in ((D, dD), (dt_bias, ddt_bias)))
    return dA, dD, ddt_bias, x.new_empty(0) if initial_state is None else torch.cat(dfirsts, dim=1)


def mamba_scan_backward_triton(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `mamba_scan_backward_reference` does; the states are recomputed for one slice of heads at a time."""
    if not x.numel():
        inputs = (x, dt, A, b, c, *rest[:2], rest[3])
        return tuple(x.new_empty(0) if t is None else torch.zeros_like(t) for t in inputs)
    out = Gradients(*(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c)))
    dA, dD, ddt_bias, dinitial_state = fill_gradients(out, dy, dfinal_state, x, dt, A, b, c, *rest)
    return out.dx, out.ddt, dA, out.db, out.dc, dD, ddt_bias, dinitial_state
