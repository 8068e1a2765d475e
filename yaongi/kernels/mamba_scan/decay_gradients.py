"""The gradients of dt, A and dt_bias from those of the Mamba-2 scan's exponents."""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.column_sums import column_sums
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv, next_power_of_2
from yaongi.kernels.mamba_scan.decays import LOG2E, Scan, load_delta

Tensor = torch.Tensor

# log2 of the smallest decay through which a gradient flows; below it, the gradient would only be rounding error.
UNDERFLOW = tl.constexpr(-126.0)


@triton.jit
def _add_within_document(summed, summed_ends, value, ends):
    """Combine two stretches of a sum within documents; `ends` says that a stretch starts its sum anew."""
    return tl.where(ends != 0, value, summed + value), summed_ends | ends


@triton.jit
def _mamba_scan_decays_backward_kernel(
    sums_ptr,  # (B, H, BLOCKS_P, padded, 4)
    dt_ptr,  # (B, L, H)
    A_ptr,  # (H)
    bias_ptr,  # (H)
    document_ptr,  # (B, L)
    ddt_ptr,  # (B, L, H)
    partial_ptr,  # (3, B · chunks, H): gradients of A, D and dt_bias
    L,
    H,
    padded,
    stride_b,
    stride_l,
    stride_h,
    stride_gb,
    stride_gl,
    stride_gh,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    BLOCKS_P: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Compute da_k = Σ_{i ≥ k} (…) + Σ_{j < k} (…) per chunk, dδ = A·da + x·du, and d(dt) = dδ·(1 − e^−δ)."""
    chunk, batch = tl.program_id(0) % (padded // CHUNK), (tl.program_id(0) // (padded // CHUNK)).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    known = head < H
    inside = known & (token < L)
    direct = tl.zeros((CHUNK, BLOCK_H), tl.float32)
    after, earlier, skip = direct, direct, direct
    for k in tl.static_range(BLOCKS_P):
        place = sums_ptr + (((batch * H + head) * BLOCKS_P + k) * padded + token) * 4
        direct += tl.load(place, mask=known, other=0.0)
        after += tl.load(place + 1, mask=known, other=0.0)
        earlier += tl.load(place + 2, mask=known, other=0.0)
        if HAS_D:
            skip += tl.load(place + 3, mask=known, other=0.0)
    delta = load_delta(dt_ptr, bias_ptr, batch, token, head, inside, stride_b, stride_l, stride_h, HAS_BIAS)
    A = tl.load(A_ptr + head, mask=known, other=0.0)
    if HAS_DOCUMENTS:  # a sum over another document's terms is zero but for rounding, and must be exactly zero
        document_ptr += batch * L
        document = tl.load(document_ptr + token, mask=token < L, other=0)
        following = tl.load(document_ptr + token + 1, mask=token + 1 < L, other=0)
        preceding = tl.load(document_ptr + token - 1, mask=(token > 0) & (token < L), other=0)
        ends = tl.broadcast_to(((document != following) & (token + 1 < L)).to(tl.int32), after.shape)
        begins = tl.broadcast_to(((document != preceding) & (token > 0) & (token < L)).to(tl.int32), after.shape)
        after, _ = tl.associative_scan((after, ends), 0, _add_within_document, reverse=True)
        before, _ = tl.associative_scan((earlier, begins), 0, _add_within_document)
    else:
        after, before = tl.cumsum(after, 0, reverse=True), tl.cumsum(earlier, 0)
    dexponent = after + (before - earlier)
    dexponent = tl.where(delta * A * LOG2E < UNDERFLOW, 0.0, dexponent)
    # σ = 1 − e^−δ is softplus' derivative. σ/δ isn't a division for small δ, which may be flushed to zero.
    small = delta < 1e-3
    sigmoid = tl.where(small, delta * (1.0 - delta / 2), 1.0 - tl.exp(-delta))
    ratio = tl.where(small, 1.0 - delta / 2, sigmoid / tl.maximum(delta, 1e-3))
    ddt = tl.where(inside, A * dexponent * sigmoid + direct * ratio, 0.0)
    place = ddt_ptr + batch * stride_gb + token.to(tl.int64) * stride_gl + head * stride_gh
    tl.store(place, ddt.to(ddt_ptr.dtype.element_ty), mask=inside)
    place = partial_ptr + tl.program_id(0).to(tl.int64) * H + head
    parts = tl.num_programs(0).to(tl.int64) * H
    tl.store(place, tl.sum(delta * dexponent, 0)[None, :], mask=known)
    if HAS_D:
        tl.store(place + parts, tl.sum(skip, 0)[None, :], mask=known)
    if HAS_BIAS:
        tl.store(place + 2 * parts, tl.sum(ddt, 0)[None, :], mask=known)


def decay_gradients(
    scan: Scan,
    ddt: Tensor,
    sums: Tensor,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    *,
    has_d: bool,
) -> Tensor:
    """Write ddt; return the gradients of A, D and dt_bias, (3, H) in fp32."""
    B, H, blocks_p = sums.shape[:3]
    partial = torch.empty(3, B * scan.chunks, H, dtype=torch.float32, device=dt.device)
    block_h = min(4, next_power_of_2(H))
    launcher(_mamba_scan_decays_backward_kernel, (B * scan.chunks, cdiv(H, block_h)))(
        sums,
        dt,
        A.contiguous(),
        None if dt_bias is None else dt_bias.contiguous(),
        scan.document_ids,
        ddt,
        partial,
        scan.length,
        H,
        scan.padded,
        *dt.stride(),
        *ddt.stride(),
        HAS_D=has_d,
        HAS_BIAS=dt_bias is not None,
        HAS_DOCUMENTS=scan.document_ids is not None,
        BLOCKS_P=blocks_p,
        CHUNK=scan.chunk,
        BLOCK_H=block_h,
        num_warps=2,
    )
    return column_sums(partial)
