"""`attention_step` in Triton: a program holds the heads of one key head of a row, and reads its part of the cache once.

It reads up to the row's own place, which it finds on the GPU: a row's result doesn't depend on the longest row.
"""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.early_launch import early_launch, let_next_start, wait_for_previous
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import next_power_of_2

Tensor = torch.Tensor

BLOCK_G = 16  # heads of a program, padded: the least that tensor cores take
ELEMENTS = 8192  # of a tile of keys


@triton.jit
def _attention_step_kernel(
    q_ptr,  # (B, H, D), contiguous
    k_ptr,  # (B, J, D), contiguous
    v_ptr,  # (B, J, D), contiguous
    keys_ptr,  # (B, J, S, D), updated in place
    values_ptr,  # (B, J, S, D), updated in place
    visible_ptr,  # (B, S)
    place_ptr,  # (B)
    y_ptr,  # (B, H, D), contiguous
    J,
    G,
    D,
    S,
    length,
    scale,
    stride_kb,
    stride_kj,
    stride_ks,
    stride_vb,
    stride_vj,
    stride_vs,
    stride_b,
    EARLY: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the token's key and value, and attend to them and to the visible places before, by the online softmax."""
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    head = tl.program_id(0).to(tl.int64)  # b·J + j
    batch, shared = head // J, head % J
    keys_ptr += batch * stride_kb + shared * stride_kj
    values_ptr += batch * stride_vb + shared * stride_vj
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    inside = (g < G)[:, None] & (d < D)[None, :]
    place = tl.load(place_ptr + batch)
    q = tl.load(q_ptr + (head * G + g[:, None]) * D + d[None, :], mask=inside, other=0.0)
    k, v = tl.load(k_ptr + head * D + d, mask=d < D, other=0.0), tl.load(v_ptr + head * D + d, mask=d < D, other=0.0)
    written = (d < D) & (place >= 0) & (place < S)
    tl.store(keys_ptr + place * stride_ks + d, k, mask=written)
    tl.store(values_ptr + place * stride_vs + d, v, mask=written)
    largest = scale * tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1)
    total = tl.full((BLOCK_G,), 1.0, tl.float32)
    y = tl.zeros((BLOCK_G, BLOCK_D), tl.float32) + v.to(tl.float32)[None, :]
    end = tl.minimum(place, length).to(tl.int32)
    for start in range(0, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        seen = tl.load(visible_ptr + batch * stride_b + s, mask=s < end, other=0).to(tl.int1)
        mask = seen[:, None] & (d < D)[None, :]
        key = tl.load(keys_ptr + s.to(tl.int64)[:, None] * stride_ks + d[None, :], mask=mask, other=0.0)
        value = tl.load(values_ptr + s.to(tl.int64)[:, None] * stride_vs + d[None, :], mask=mask, other=0.0)
        scores = tl.where(seen[None, :], scale * tl.dot(q, key.T), float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, axis=1))
        kept, weights = tl.exp(largest - highest), tl.exp(scores - highest[:, None])
        total = total * kept + tl.sum(weights, axis=1)
        y = tl.dot(weights.to(value.dtype), value, y * kept[:, None])
        largest = highest
    y /= total[:, None]
    tl.store(y_ptr + (head * G + g[:, None]) * D + d[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def attention_step_triton(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, visible: Tensor, place: Tensor, length: int
) -> Tensor:
    """Compute what `attention_step_reference` does, for up to 16 heads per key head."""
    (B, H, D), J, S = q.shape, k.shape[1], keys.shape[2]
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    block_d = max(16, next_power_of_2(D))
    launcher(_attention_step_kernel, (B * J,))(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        keys,
        values,
        visible,
        place.contiguous(),
        y,
        J,
        H // J,
        D,
        S,
        length,
        D**-0.5,
        *keys.stride()[:3],
        *values.stride()[:3],
        visible.stride(0),
        **early_launch(q),
        BLOCK_G=BLOCK_G,
        BLOCK_S=ELEMENTS // block_d,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=3,
    )
    return y
