"""Step sizes and carried states of the Mamba-2 scan in Triton: what the output and the gradients are made from.

    steps    δ = softplus(dt + dt_bias), and the sum of δ·A since the entry of each chunk           one launch
    states   walks along the sequence with the state in registers, forwards or backwards            one launch
    chain    where few heads would leave the GPU idle: from totals of segments to their entries     two launches before

The steps are four numbers a token: S, the sum of δ·A·log2(e) since the entry of its chunk; s, what rounding S to fp32
left out; s − log2(δ); and o·δ. Then E_ij·δ_j = 2^((S_i − S_j) + (s_i − (s_j − log2(δ_j)))) keeps small differences even
after a decay of e^−100000, costs one exponential, and needs no product with δ. The first token of a document has the
exponent NOTHING: every decay across it is then zero by itself, and no kernel but the first sees documents.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

Tensor = torch.Tensor
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter has no inline assembly, no libdevice
LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-256.0)  # a step of this exponent leaves zero in fp32, as every stronger decay does
PLANES = tl.constexpr(4)  # of the steps


@dataclass(frozen=True)
class Config:
    """How a kernel is run."""

    num_warps: int
    num_stages: int


# By bytes of an operand's element: 64 rows are the tensor core's tile; fp32 goes without it, and takes few registers.
CHUNK = {2: 64, 4: 16}
BLOCK_P = {2: 64, 4: 32}
STATES = {2: Config(num_warps=4, num_stages=3), 4: Config(num_warps=8, num_stages=1)}
SLOTS = 264  # walks that fill the 132 multiprocessors, two on each
ENOUGH_BACKWARD = 128  # walks from which a backward pass does better with the sequence whole


@dataclass(frozen=True)
class Scan:
    """The step sizes of one call, and how its sequence is cut."""

    steps: Tensor  # (B, H, 4, padded), fp32: S, its remainder s, s − log2(δ), o·δ
    length: int
    chunk: int
    segments: int

    @property
    def padded(self) -> int:
        """L rounded up to whole chunks; steps of size 0 fill the rest."""
        return self.steps.shape[3]

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return self.padded // self.chunk

    @property
    def chunks_a_segment(self) -> int:
        """The last segment may have fewer."""
        return triton.cdiv(self.chunks, self.segments)


@triton.jit
def exp2(value):
    """2^value by the one instruction, flushing denormals: `tl.exp2` spends three more on them."""
    if INTERPRETED:
        return tl.exp2(value)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def softplus(value):
    """log(1 + e^value), exact to rounding where the result is tiny too."""
    if INTERPRETED:
        small = tl.exp(-tl.abs(value))
        return tl.maximum(value, 0.0) + tl.where(small < 1e-4, small * (1 - small / 2), tl.log(1 + small))
    return tl.maximum(value, 0.0) + libdevice.log1p(libdevice.exp(-tl.abs(value)))


@triton.jit
def load_delta(dt_ptr, bias_ptr, batch, token, head, inside, stride_b, stride_l, stride_h, HAS_BIAS: tl.constexpr):
    """δ = softplus(dt + dt_bias) of tokens × heads, 0 beyond the sequence's end."""
    place = dt_ptr + batch * stride_b + token.to(tl.int64) * stride_l + head * stride_h
    raw = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + head, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, softplus(raw), 0.0)


@triton.jit
def load_tile(desc, batch, row, head, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of one head of a (B, heads, L, columns) tensor, zeros beyond its end."""
    return desc.load([batch, head, row, column]).reshape(ROWS, COLUMNS)


@triton.jit
def store_tile(desc, batch, row, head, column, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The same rows, stored; what lies beyond the end is dropped."""
    desc.store([batch, head, row, column], tile.to(desc.dtype).reshape(1, 1, ROWS, COLUMNS))


@triton.jit
def load_state(desc, row, column, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """A state (P, N), transposed."""
    return desc.load([row, column, 0]).reshape(BLOCK_P, BLOCK_N).T


@triton.jit
def store_state(desc, row, column, state, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """A transposed state, stored as (P, N)."""
    desc.store([row, column, 0], state.T.reshape(1, BLOCK_P, BLOCK_N))


@triton.jit
def scaled(tile, weight):
    """A tile, its rows weighted, rounded to its dtype again."""
    return (tile.to(tl.float32) * weight[:, None]).to(tile.dtype)


@triton.jit
def load_row(desc, row, start, CHUNK: tl.constexpr):
    """CHUNK tokens of a row of the steps, through the copy engine like the tiles, since many layouts want them."""
    return desc.load([row, start]).reshape(CHUNK)


@triton.jit
def load_into(steps_desc, row, start, CHUNK: tl.constexpr):
    """e, the decay from the chunk's entry to each token."""
    return exp2(load_row(steps_desc, row * PLANES, start, CHUNK))


@triton.jit
def load_out(steps_desc, row, start, CHUNK: tl.constexpr):
    """o·δ, the decay from each token to the chunk's end times its step size."""
    return load_row(steps_desc, row * PLANES + 3, start, CHUNK)


@triton.jit
def load_through(steps_ptr, start, CHUNK: tl.constexpr):
    """t, the decay from the chunk's entry to its end; `steps_ptr` is that of the head."""
    return exp2(tl.load(steps_ptr + start + (CHUNK - 1)))


@triton.jit
def load_decays(steps_desc, row, start, CHUNK: tl.constexpr):
    """E ∘ δ (CHUNK, CHUNK), from input j to output i, 0 where j is later: selected, since there it may be infinite."""
    high = load_row(steps_desc, row * PLANES, start, CHUNK)
    low = load_row(steps_desc, row * PLANES + 1, start, CHUNK)
    low_and_step = load_row(steps_desc, row * PLANES + 2, start, CHUNK)
    causal = tl.arange(0, CHUNK)[:, None] >= tl.arange(0, CHUNK)[None, :]
    exponent = (high[:, None] - high[None, :]) + (low[:, None] - low_and_step[None, :])
    return tl.where(causal, exp2(exponent), 0.0)


@triton.jit
def load_step(steps_desc, row, start, CHUNK: tl.constexpr):
    """δ of a chunk's tokens."""
    low = load_row(steps_desc, row * PLANES + 1, start, CHUNK)
    return exp2(low - load_row(steps_desc, row * PLANES + 2, start, CHUNK))


@triton.jit
def _mamba_scan_steps_kernel(
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
    row = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)[:, None]
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    batch = tl.program_id(2).to(tl.int64)
    inside = (row < L) & (head < H)
    delta = load_delta(dt_ptr, bias_ptr, batch, row, head, inside, stride_b, stride_l, stride_h, HAS_BIAS)
    A = tl.load(A_ptr + head, mask=head < H, other=0.0).to(tl.float64)
    exponent = tl.maximum(delta.to(tl.float64) * (A * LOG2E), NOTHING)
    if HAS_DOCUMENTS:
        document_ptr += batch * L
        document = tl.load(document_ptr + row, mask=row < L, other=0)
        before = tl.load(document_ptr + row - 1, mask=(row > 0) & (row < L), other=0)
        exponent = tl.where((document != before) & (row > 0), NOTHING, exponent)
    total = tl.cumsum(exponent, 0)
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    whole = tl.sum(tl.where(row == tl.program_id(0) * CHUNK + CHUNK - 1, total, 0.0), 0)[None, :]
    out = tl.exp2((whole - total).to(tl.float32)) * delta
    place = steps_ptr + (batch * H + head) * PLANES * padded + row
    tl.store(place, high, mask=head < H)
    tl.store(place + padded, low, mask=head < H)
    tl.store(place + 2 * padded, low - tl.log2(delta), mask=head < H)  # +inf where δ is 0
    tl.store(place + 3 * padded, out, mask=head < H)


@triton.jit
def _mamba_scan_states_kernel(
    x_desc,  # x (B, H, L, P); in reverse dy
    b_desc,  # b (B, G, L, N); in reverse c
    steps_desc,  # (B·H·4, padded)
    steps_ptr,
    entry_desc,  # (S·B·H, P, N), fp32: the state with which each segment begins
    states_desc,  # (B·H·chunks, N, P), the state at each chunk's entry; in reverse the gradient of that at its end
    end_desc,  # (S·B·H, P, N), fp32: totals of the segments; else (B·H, P, N), the last state
    H,
    P,
    padded,
    heads_a_group,
    chunks,
    chunks_a_segment,
    TOTALS: tl.constexpr,
    HAS_ENTRY: tl.constexpr,
    HAS_END: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h ← t·h + Σ_j o_j·δ_j·x_j ⊗ b_j over the chunks; in reverse g ← t·g + Σ_i e_i·dy_i ⊗ c_i; transposed, (N, P)."""
    blocks_p = tl.cdiv(P, BLOCK_P)
    row, column = tl.program_id(0) // blocks_p, (tl.program_id(0) % blocks_p) * BLOCK_P
    batch, head, segment = row // H, row % H, tl.program_id(1)
    if TOTALS and REVERSE:
        segment += 1  # of the first segment in the walk's order a total is needed, of the last one none
    segment_row = segment * (tl.num_programs(0) // blocks_p) + row
    steps_ptr += row.to(tl.int64) * PLANES * padded
    state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if HAS_ENTRY:
        state = load_state(entry_desc, segment_row, column, BLOCK_P, BLOCK_N)
    first = segment * chunks_a_segment
    end = tl.minimum(first + chunks_a_segment, chunks)
    for i in tl.range(first, end, disable_licm=True):
        chunk = first + end - 1 - i if REVERSE else i
        if not TOTALS:
            tile = state.to(states_desc.dtype).reshape(1, BLOCK_N, BLOCK_P)
            states_desc.store([row * chunks + chunk, 0, column], tile)
        start = chunk * CHUNK
        x = load_tile(x_desc, batch, start, head, column, CHUNK, BLOCK_P)
        b = load_tile(b_desc, batch, start, head // heads_a_group, 0, CHUNK, BLOCK_N)
        if REVERSE:
            weight = load_into(steps_desc, row, start, CHUNK)
        else:
            weight = load_out(steps_desc, row, start, CHUNK)
        through = load_through(steps_ptr, start, CHUNK)
        weighted = x.to(tl.float32) * weight[:, None]
        rounded = weighted.to(x.dtype)
        state = tl.dot(b.T, rounded, state * through, input_precision="ieee")
        if x.dtype != tl.float32:  # what rounding left out is most of dA's error, and the bytes leave time for it
            state = tl.dot(b.T, (weighted - rounded.to(tl.float32)).to(x.dtype), state, input_precision="ieee")
    if TOTALS:
        store_state(end_desc, segment_row, column, state, BLOCK_P, BLOCK_N)
    elif HAS_END and segment == (0 if REVERSE else tl.num_programs(1) - 1):
        store_state(end_desc, row, column, state, BLOCK_P, BLOCK_N)


@triton.jit
def _mamba_scan_chain_kernel(
    totals_ptr,  # (S, B, H, P·N): each segment's own contribution; becomes the state with which it begins
    first_ptr,  # (B, H, P·N)
    steps_ptr,  # (B, H, 4, padded)
    size,
    padded,
    chunks_a_segment,
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
        start = segment * chunks_a_segment * CHUNK
        ends = start + z * CHUNK + (CHUNK - 1)
        inside = (z < chunks_a_segment) & (ends < padded)
        through = exp2(tl.sum(tl.load(steps_ptr + ends, mask=inside, other=0.0)))
        segment_ptr = totals_ptr + segment.to(tl.int64) * tl.num_programs(0) * size + place
        total = tl.load(segment_ptr, mask=(i < size) & (k < segments - 1), other=0.0)
        tl.store(segment_ptr, state, mask=i < size)
        state = state * through + total


def descriptor(t: Tensor, *block: int) -> TensorDescriptor:
    """Boxes of a tensor for the copy engine."""
    return TensorDescriptor.from_tensor(t, [*(1 for _ in t.shape[len(block) :]), *block])


def by_head(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of rows × columns of one head (or group) of a (B, L, heads, columns) tensor."""
    return descriptor(t.transpose(1, 2), rows, columns)


def state_descriptor(t: Tensor | None, block_p: int, block_n: int) -> TensorDescriptor | None:
    """Boxes of states (…, P, N)."""
    return None if t is None else descriptor(t.view(-1, *t.shape[-2:]), block_p, block_n)


def row_descriptor(scan: Scan) -> TensorDescriptor:
    """Chunks of the rows of the steps."""
    return descriptor(scan.steps.view(-1, scan.padded), scan.chunk)


def addressable(t: Tensor) -> Tensor:
    """A tensor that the copy engine can read: unit stride along the last dimension, all else 16 bytes aligned."""
    strides = all(s > 0 and s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
    return (
        t
        if t.stride(-1) == 1 and strides and t.data_ptr() % 16 == 0
        else t.clone(memory_format=torch.contiguous_format)
    )


def blocks_of(x: Tensor, N: int) -> tuple[int, int]:
    """The tile of a state: a block of P, all of N."""
    block_p = min(BLOCK_P[x.element_size()], triton.next_power_of_2(x.shape[3]))
    return max(16, block_p), max(16, triton.next_power_of_2(N))


def scan_steps(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    document_ids: Tensor | None,
    *,
    backward: bool = False,
) -> Scan:
    """The step sizes of a call, cut into chunks and, where heads are few, segments."""
    (B, L, H, P), chunk = x.shape, CHUNK[x.element_size()]
    chunks = triton.cdiv(L, chunk)
    steps = torch.empty(B, H, PLANES.value, chunks * chunk, dtype=torch.float32, device=x.device)
    block_h = min(4, triton.next_power_of_2(H))
    _mamba_scan_steps_kernel[(chunks, triton.cdiv(H, block_h), B)](
        dt,
        A.contiguous(),
        None if dt_bias is None else dt_bias.contiguous(),
        None if document_ids is None else document_ids.contiguous(),
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
    walks = B * H * triton.cdiv(P, blocks_of(x, 1)[0])
    segments = max(1, min(SLOTS // walks, chunks // 8))
    if backward and walks >= ENOUGH_BACKWARD:
        segments = 1
    segments = triton.cdiv(chunks, triton.cdiv(chunks, segments))
    return Scan(steps, L, chunk, segments)


def _walk(
    scan: Scan, x: Tensor, b: Tensor, entry: Tensor | None, states: Tensor | None, end: Tensor | None, reverse: bool
) -> None:
    """Launches the states kernel: where `states` is None the totals of all segments but the walk's last."""
    (B, _, H, P), (G, N) = x.shape, b.shape[2:]
    block_p, block_n = blocks_of(x, N)
    config = STATES[x.element_size()]
    segments = scan.segments - (states is None)
    _mamba_scan_states_kernel[(B * H * triton.cdiv(P, block_p), segments)](
        by_head(x, scan.chunk, block_p),
        by_head(b, scan.chunk, block_n),
        row_descriptor(scan),
        scan.steps,
        state_descriptor(entry, block_p, block_n),
        None if states is None else descriptor(states, block_n, block_p),
        state_descriptor(end, block_p, block_n),
        H,
        P,
        scan.padded,
        H // G,
        scan.chunks,
        scan.chunks_a_segment,
        TOTALS=states is None,
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
    """The state with which each segment begins, (S, B, H, P, N); with one segment just the first of all."""
    if scan.segments == 1:
        return first
    (B, _, H, P), N = x.shape, b.shape[3]
    totals = torch.empty(scan.segments, B, H, P, N, dtype=torch.float32, device=x.device)
    _walk(scan, x, b, None, None, totals, reverse)
    _mamba_scan_chain_kernel[(B * H, triton.cdiv(P * N, 1024))](
        totals,
        first,
        scan.steps,
        P * N,
        scan.padded,
        scan.chunks_a_segment,
        scan.segments,
        HAS_FIRST=first is not None,
        REVERSE=reverse,
        CHUNK=scan.chunk,
        BLOCK_Z=triton.next_power_of_2(scan.chunks_a_segment),
        BLOCK=1024,
    )
    return totals


def scan_states(
    scan: Scan, x: Tensor, b: Tensor, first: Tensor | None, end: Tensor | None, *, reverse: bool = False
) -> Tensor:
    """The state at each chunk's entry (B·H·chunks, N, P) in x's dtype; in reverse the gradient of that at its end.

    In reverse x is dy, b is c and `first` the final state's gradient; `end` receives the last state of the walk.
    """
    B, _, H, P = x.shape
    states = torch.empty(B * H * scan.chunks, b.shape[3], P, dtype=x.dtype, device=x.device)
    _walk(scan, x, b, segment_entries(scan, x, b, first, reverse=reverse), states, end, reverse)
    return states
