"""Step sizes and decays of the Mamba-2 scan: δ = softplus(dt + dt_bias), and the sum of δ·A since each chunk's entry.

One launch computes them for all later kernels. It stores four numbers per token: S, the sum of δ·A·log2(e) since the
entry of its chunk; s, the rounding error of S in fp32; s − log2(δ); and o·δ. Then E_ij·δ_j = 2^((S_i − S_j) + (s_i −
(s_j − log2(δ_j)))) keeps small differences even after a decay of e^−100000, costs one exponential, and needs no product
with δ. The first token of a document gets the exponent ZERO_DECAY, so every decay across it is zero, and only this
kernel needs the document ids. A token whose step size or exponent is not finite gets NaN for S and o·δ, and decays
past it go on as if it were not there: isolation.py says what follows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

from yaongi.kernels.common.descriptors import descriptor, flattened
from yaongi.kernels.common.generations import for_gpu
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv, next_power_of_2
from yaongi.kernels.mamba_scan.isolation import not_finite
from yaongi.kernels.mamba_scan.tiles import state_block

Tensor = torch.Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter has no inline assembly, no libdevice

LOG2E = tl.constexpr(1.4426950408889634)

ZERO_DECAY = tl.constexpr(-256.0)  # log2 of a decay that is zero in fp32

PLANES = tl.constexpr(4)  # numbers stored per token

# By GPU generation and bytes per element: 64 rows are one tile of Hopper's tensor cores, and fewer save registers;
# fp32 doesn't use tensor cores.
CHUNK = {8: {2: 32, 4: 16}, 9: {2: 64, 4: 16}, 12: {2: 32, 4: 16}}

RESIDENT_PROGRAMS = 264  # programs that fill an H100: two per multiprocessor

UNSEGMENTED_FROM = 128  # with at least this many programs, the backward uses one segment


@dataclass(frozen=True)
class Scan:
    """Step sizes and decays of one call, and how its sequence is cut into chunks and segments."""

    steps: Tensor  # (B, H, 4, padded), fp32: S, its rounding error s, s − log2(δ), o·δ
    length: int
    chunk: int
    segments: int
    document_ids: Tensor | None  # (B, L), contiguous

    @property
    def padded(self) -> int:
        """L rounded up to a multiple of the chunk; the padding has step size 0."""
        return self.steps.shape[3]

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return self.padded // self.chunk

    @property
    def chunks_per_segment(self) -> int:
        """Chunks per segment; the last segment may have fewer."""
        return cdiv(self.chunks, self.segments)


@triton.jit
def exp2(value):
    """Return 2^value with one instruction that flushes denormals; `tl.exp2` needs three more to keep them."""
    if INTERPRETED:
        return tl.exp2(value)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def softplus(value):
    """Return log(1 + e^value), accurate to rounding also where the result is tiny."""
    if INTERPRETED:
        small = tl.exp(-tl.abs(value))
        return tl.maximum(value, 0.0) + tl.where(small < 1e-4, small * (1 - small / 2), tl.log(1 + small))
    return tl.maximum(value, 0.0) + libdevice.log1p(libdevice.exp(-tl.abs(value)))


@triton.jit
def load_delta(dt_ptr, bias_ptr, batch, token, head, inside, stride_b, stride_l, stride_h, HAS_BIAS: tl.constexpr):
    """Load dt and return δ = softplus(dt + dt_bias) of tokens × heads, 0 beyond the sequence's end."""
    place = dt_ptr + batch * stride_b + token.to(tl.int64) * stride_l + head * stride_h
    raw = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + head, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, softplus(raw), 0.0)


@triton.jit
def load_row(desc, row, start, CHUNK: tl.constexpr):
    """Load CHUNK tokens of a row of the steps, through TMA like the tiles: several register layouts need the values."""
    return desc.load([row, start]).reshape(CHUNK)


@triton.jit
def load_into(steps_desc, row, start, CHUNK: tl.constexpr):
    """Load e, the decay from the chunk's entry to each token."""
    return exp2(load_row(steps_desc, row * PLANES, start, CHUNK))


@triton.jit
def load_out(steps_desc, row, start, CHUNK: tl.constexpr):
    """Load o·δ, the decay from each token to the chunk's end times the token's step size."""
    return load_row(steps_desc, row * PLANES + 3, start, CHUNK)


@triton.jit
def load_through(steps_ptr, start, CHUNK: tl.constexpr):
    """Load t, the decay from the chunk's entry to its end; `steps_ptr` points to the head's steps."""
    return exp2(tl.load(steps_ptr + start + (CHUNK - 1)))


@triton.jit
def load_decays(steps_desc, row, start, CHUNK: tl.constexpr):
    """Return E ∘ δ (CHUNK, CHUNK) from input j to output i; `where` zeroes j > i, where it may be infinite."""
    high = load_row(steps_desc, row * PLANES, start, CHUNK)
    low = load_row(steps_desc, row * PLANES + 1, start, CHUNK)
    low_and_step = load_row(steps_desc, row * PLANES + 2, start, CHUNK)
    causal = tl.arange(0, CHUNK)[:, None] >= tl.arange(0, CHUNK)[None, :]
    exponent = (high[:, None] - high[None, :]) + (low[:, None] - low_and_step[None, :])
    return tl.where(causal, exp2(exponent), 0.0)


@triton.jit
def load_step(steps_desc, row, start, CHUNK: tl.constexpr):
    """Return δ of a chunk's tokens."""
    low = load_row(steps_desc, row * PLANES + 1, start, CHUNK)
    return exp2(low - load_row(steps_desc, row * PLANES + 2, start, CHUNK))


@triton.jit
def _mamba_scan_decays_kernel(
    dt_ptr,  # (B, L, H)
    A_ptr,  # (H)
    bias_ptr,  # (H)
    document_ptr,  # (B, L)
    steps_ptr,  # (B, H, 4, padded)
    L,
    H,
    padded,
    stride_b,
    stride_l,
    stride_h,
    HAS_BIAS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    chunk, batch = tl.program_id(0) % (padded // CHUNK), (tl.program_id(0) // (padded // CHUNK)).to(tl.int64)
    row = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    inside = (row < L) & (head < H)
    delta = load_delta(dt_ptr, bias_ptr, batch, row, head, inside, stride_b, stride_l, stride_h, HAS_BIAS)
    A = tl.load(A_ptr + head, mask=head < H, other=0.0).to(tl.float64)
    exponent = tl.maximum(delta.to(tl.float64) * (A * LOG2E), ZERO_DECAY, propagate_nan=tl.PropagateNan.ALL)
    broken = (not_finite(delta) != 0) | (exponent != exponent)
    exponent = tl.where(broken, 0.0, exponent)
    if HAS_DOCUMENTS:
        document_ptr += batch * L
        document = tl.load(document_ptr + row, mask=row < L, other=0)
        before = tl.load(document_ptr + row - 1, mask=(row > 0) & (row < L), other=0)
        exponent = tl.where((document != before) & (row > 0), ZERO_DECAY, exponent)
    total = tl.cumsum(exponent, 0)
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    whole = tl.sum(tl.where(row == chunk * CHUNK + CHUNK - 1, total, 0.0), 0)[None, :]
    out = tl.exp2((whole - total).to(tl.float32)) * delta
    place = steps_ptr + (batch * H + head) * PLANES * padded + row
    tl.store(place, tl.where(broken, float("nan"), high), mask=head < H)
    tl.store(place + padded, low, mask=head < H)
    tl.store(place + 2 * padded, low - tl.log2(delta), mask=head < H)  # +inf where δ is 0
    tl.store(place + 3 * padded, tl.where(broken, float("nan"), out), mask=head < H)


def row_descriptor(scan: Scan) -> TensorDescriptor:
    """Return a TMA descriptor for chunks of the steps' rows."""
    return descriptor(scan.steps, scan.chunk, view=flattened)


def scan_decays(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    document_ids: Tensor | None,
    *,
    backward: bool = False,
) -> Scan:
    """Compute the step sizes and decays of a call; cut it into chunks and, if heads are few, into segments."""
    (B, L, H, P), chunk = x.shape, for_gpu(CHUNK, x)[x.element_size()]
    chunks = cdiv(L, chunk)
    steps = torch.empty(B, H, PLANES.value, chunks * chunk, dtype=torch.float32, device=x.device)
    ids = None if document_ids is None else document_ids.contiguous()
    block_h = min(4, next_power_of_2(H))
    launcher(_mamba_scan_decays_kernel, (B * chunks, cdiv(H, block_h)))(
        dt,
        A.contiguous(),
        None if dt_bias is None else dt_bias.contiguous(),
        ids,
        steps,
        L,
        H,
        steps.shape[3],
        *dt.stride(),
        HAS_BIAS=dt_bias is not None,
        HAS_DOCUMENTS=document_ids is not None,
        CHUNK=chunk,
        BLOCK_H=block_h,
        num_warps=1,
    )
    walks = B * H * cdiv(P, state_block(x, 1)[0])
    segments = max(1, min(RESIDENT_PROGRAMS // walks, chunks // 8))
    if backward and walks >= UNSEGMENTED_FROM:
        segments = 1
    segments = cdiv(chunks, cdiv(chunks, segments))
    return Scan(steps, L, chunk, segments, ids)
