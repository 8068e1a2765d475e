"""Cross entropy in Triton: one memory-bound pass over the logits per direction."""

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv, next_power_of_2

Tensor = torch.Tensor
BLOCK = 4096  # logits per program, in registers: 16 per thread
NUM_WARPS = 8


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (T, V)
    target_ptr,  # (T)
    loss_ptr,  # (T)
    normalizer_ptr,  # (T)
    V,
    stride,
    BLOCK: tl.constexpr,
):
    """Walk one row per program, keeping the largest logit and Σ e^(l − largest), rescaled when a larger one comes."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + i, mask=i < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(logits, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)  # if all logits so far are −∞, the sum stays 0
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift), 0)
        largest = new
    normalizer = largest + tl.log(total)
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < V)
    picked = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(target < 0, 0.0, normalizer - picked))
    tl.store(normalizer_ptr + row, normalizer)


@triton.jit
def _cross_entropy_backward_kernel(
    dloss_ptr,  # (T)
    dnormalizer_ptr,  # (T)
    logits_ptr,  # (T, V)
    target_ptr,  # (T)
    normalizer_ptr,  # (T)
    dlogits_ptr,  # (T, V), contiguous
    V,
    stride,
    BLOCK: tl.constexpr,
):
    """Compute dl = (dloss + dn)·e^(l − n) − dloss·[v = target] for one block of a row per program."""
    blocks = tl.cdiv(V, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * stride + i, mask=i < V, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + row)
    dloss = tl.where(target < 0, 0.0, tl.load(dloss_ptr + row).to(tl.float32))
    softmax = tl.exp(logits - tl.load(normalizer_ptr + row))
    dlogits = (dloss + tl.load(dnormalizer_ptr + row).to(tl.float32)) * softmax - tl.where(i == target, dloss, 0.0)
    tl.store(dlogits_ptr + row * V + i, dlogits.to(dlogits_ptr.dtype.element_ty), mask=i < V)


def cross_entropy_triton(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what `cross_entropy_reference` does."""
    T, V = logits.shape
    losses, normalizers = (torch.empty(T, dtype=torch.float32, device=logits.device) for _ in range(2))
    if T:
        block = min(BLOCK, next_power_of_2(V))
        launcher(_cross_entropy_kernel, (T,))(
            logits,
            targets.contiguous(),
            losses,
            normalizers,
            V,
            logits.stride(0),
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
    return losses, normalizers


def cross_entropy_backward_triton(
    dlosses: Tensor, dnormalizers: Tensor, logits: Tensor, targets: Tensor, normalizers: Tensor
) -> Tensor:
    """Compute what `cross_entropy_backward_reference` does."""
    T, V = logits.shape
    dlogits = torch.empty(T, V, dtype=logits.dtype, device=logits.device)
    if T:
        block = min(BLOCK, next_power_of_2(V))
        launcher(_cross_entropy_backward_kernel, (T * cdiv(V, block),))(
            dlosses.contiguous(),
            dnormalizers.contiguous(),
            logits,
            targets.contiguous(),
            normalizers.contiguous(),
            dlogits,
            V,
            logits.stride(0),
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
    return dlogits
