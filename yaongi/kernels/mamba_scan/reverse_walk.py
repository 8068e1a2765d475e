"""The Mamba-2 scan's backward in CUDA: one reverse walk, which keeps the gradients of the states in shared memory.

    states     the state h at each chunk's entry                                        Triton, chunk_states.py
    entries    if few rows and groups would leave the GPU idle: the gradient of the state at each segment's end
    walk       each block takes a segment of four heads of a row: dx, db, dc, and sums  csrc/mamba_scan/backward.cu
    steps'     the gradients of the exponents give those of dt, A and dt_bias           Triton, decay_gradients.py

With documents, a block in which something is not finite raises its flag, and the Triton kernels do its work anew
(isolation.py).
"""

import dataclasses

import torch

from yaongi.kernels.backend import cuda_launcher
from yaongi.kernels.common.sizes import cdiv
from yaongi.kernels.mamba_scan.chunk_states import scan_states, segment_entries, walk
from yaongi.kernels.mamba_scan.decay_gradients import decay_gradients
from yaongi.kernels.mamba_scan.decays import Scan, scan_decays
from yaongi.kernels.mamba_scan.scan_backward import (
    STATES_BYTES,
    Gradients,
    bytes_of_states,
    fill_gradients,
    scan_gradients,
    slices_of,
)

Tensor = torch.Tensor
BLOCKS = 132  # blocks that fill an H100, one per multiprocessor
LEAST_CHUNKS = 8  # of a segment
PART = 4  # heads of a block; the parts of a group pass on sums
PASSED = 2 * 2 * 64 * 128  # of db and dc, in two chunks


def reverse_scan(scan: Scan, walks: int) -> Scan:
    """Return the same scan, cut into as many segments as fill the GPU."""
    wanted = max(1, min(BLOCKS // walks, scan.chunks // LEAST_CHUNKS))
    return dataclasses.replace(scan, segments=cdiv(scan.chunks, cdiv(scan.chunks, wanted)))


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
    B, H, G = x.shape[0], x.shape[2], b.shape[2]
    dlast, first = (None if t is None else t.contiguous() for t in (dlast, first))
    dfirst = None if first is None else torch.empty_like(first)
    scan = scan_decays(x, dt, A, dt_bias, document_ids, backward=True)
    states = scan_states(scan, x, b, first, None)
    reverse = reverse_scan(scan, B * H // PART)
    entry = segment_entries(reverse, dy, c, dlast, reverse=True)
    blocks = B * H // PART * reverse.segments
    sums = torch.empty(B, H, 1, scan.padded, 4, dtype=torch.float32, device=x.device)
    flags = None if document_ids is None else torch.zeros(blocks, dtype=torch.int32, device=x.device)
    cuda_launcher("mamba_scan_backward")(
        *(t.flatten(2) for t in (x, dy, b, c)),
        states,
        scan.steps,
        None if D is None else D.float().contiguous(),
        entry,
        dfirst,
        *(t.flatten(2) for t in (out.dx, out.db, out.dc)),
        sums,
        torch.empty(blocks, PASSED, dtype=torch.float32, device=x.device),
        flags,
        G,
        reverse.segments,
        reverse.chunks_per_segment,
    )
    if flags is not None:
        _isolate(reverse, flags, out, dy, x, b, c, D, states, entry, dfirst, sums)
    return decay_gradients(scan, out.ddt, sums, dt, A, dt_bias, has_d=D is not None), dfirst


def _isolate(
    scan: Scan,
    flags: Tensor,
    out: Gradients,
    dy: Tensor,
    x: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    states: Tensor,
    entry: Tensor | None,
    dfirst: Tensor | None,
    sums: Tensor,
) -> None:
    """Compute anew, by the Triton kernels, what a flagged block has computed."""
    B, (G, H) = x.shape[0], (b.shape[2], x.shape[2])
    by_segment = flags.view(B, G, scan.segments, -1).amax(3)
    walks = by_segment.repeat_interleave(H // G, 1).permute(2, 0, 1).contiguous()
    chunks = by_segment.repeat_interleave(scan.chunks_per_segment, 2)[..., : scan.chunks].contiguous()
    dstates = torch.empty_like(states)
    walk(scan, dy, c, entry, dstates, dfirst, True, walks)
    scan_gradients(scan, out, dy, x, b, c, D, states, dstates, sums, chunks)


def fill_gradients_cuda(out: Gradients, *arguments: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `fill_gradients` does; a slice is one or more complete groups."""
    x, b = arguments[2], arguments[5]
    assert x is not None
    assert b is not None
    H, G = x.shape[2], b.shape[2]
    slices = slices_of(min(bytes_of_states(x, b), G * STATES_BYTES), H, G)
    return fill_gradients(out, *arguments, of_slice=_slice_gradients, slices=slices)


def mamba_scan_backward_cuda(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `mamba_scan_backward_reference` does, for the sizes that the kernel is written for."""
    out = Gradients(*(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c)))
    dA, dD, ddt_bias, dinitial_state = fill_gradients_cuda(out, dy, dfinal_state, x, dt, A, b, c, *rest)
    return out.dx, out.ddt, dA, out.db, out.dc, dD, ddt_bias, dinitial_state
