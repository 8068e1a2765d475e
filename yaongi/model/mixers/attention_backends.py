"""Causal attention within documents, on the fastest backend that is right.

| backend | chosen by `attention_backend = "auto"` for |
|---|---|
| sdpa, causal | rows without document ids: cuDNN first, then flash, then torch's other kernels |
| flex | packed documents on a GPU in float16 or bfloat16, with gradients: deterministic, no synchronisation |
| varlen | the same, but without gradients: `torch.nn.attention.varlen` |
| sdpa, masked | packed documents elsewhere: a boolean mask (B, 1, L, L) |

"flash" (the flash-attn package) is used only if the config names it.
"""

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from yaongi.model.config import AttentionBackend
from yaongi.model.layers.compiled import compiled

Tensor = torch.Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)

# On an H100 cuDNN has the fastest causal kernel, but torch does not prefer it by itself.
SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# Tiles of flex_attention's backward pass: 1.31 ms instead of 1.46 ms with its own choice (2 × 4096, 32 query and 8
# key-value heads of 64, H100).
FLEX_OPTIONS = {f"bwd_BLOCK_{name}": 64 for name in ("M1", "N1", "M2", "N2")} | {
    "bwd_num_warps": 4,
    "bwd_num_stages": 3,
}


@dataclass(frozen=True)
class AttentionPlan:
    """The backend and mask of attention, made once per forward pass for all attention layers."""

    backend: Literal["sdpa", "varlen", "flex", "flash"]
    mask: Any = None  # sdpa: (B, 1, L, L) bool or None for causal; flex: a BlockMask
    cu_seqlens: Tensor | None = None  # varlen, flash: (documents + 1,) int32, starts of documents in the B·L tokens
    max_seqlen: int = 0  # varlen, flash: tokens of the largest document


@dataclass(frozen=True)
class CachedAttention:
    """How one new token of each row attends to a cache, made once per step for all attention layers."""

    place: Tensor  # (B,) int64, the token's place in its row of the cache
    visible: Tensor  # (B, capacity) bool, the places that may be attended to, its own included
    length: int  # places of the cache to look at


@dataclass(frozen=True)
class ContinuedAttention:
    """How more tokens of each row attend to a cache and to each other, made once for all attention layers."""

    start: int  # place of the first of them in the cache
    mask: Tensor  # (B, 1, L, start + L) bool, the places that a token may attend to


def plan_attention(
    wanted: AttentionBackend,
    shape: torch.Size,
    document_ids: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    most_documents: int | None = None,
) -> AttentionPlan:
    """Choose the backend for tokens of shape (B, L) and prepare its mask.

    Args:
        most_documents: no row has more; without it varlen and flash synchronise with the GPU twice per forward pass.

    Raises:
        ValueError: the backend that the config names can't run on this device or dtype.
    """
    fast = device.type == "cuda" and dtype in HALF_DTYPES
    if wanted == "auto":
        wanted = "sdpa"
        if document_ids is not None and fast:
            wanted = "flex" if torch.is_grad_enabled() else "varlen" if has_varlen() else "sdpa"
    if wanted in ("varlen", "flash"):
        if not fast:
            raise ValueError(
                f"attention: attention_backend={wanted!r} must have a GPU and float16 or bfloat16, got {device} and "
                f"{str(dtype).removeprefix('torch.')}"
            )
        cu_seqlens, max_seqlen = document_cu_seqlens(shape, document_ids, device, most_documents)
        return AttentionPlan(wanted, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    if wanted == "flex":
        return AttentionPlan("flex", mask=_flex_mask(shape, document_ids, device))
    return AttentionPlan("sdpa", mask=None if document_ids is None else document_mask(document_ids))


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Attend from q (B, L, heads, D) to k and v (B, L, kv heads, D): (B, L, heads, D).

    Raises:
        ImportError: the backend is not installed.
    """
    if plan.backend in ("varlen", "flash"):
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        function = _varlen() if plan.backend == "varlen" else _flash()
        return function(*flat, plan.cu_seqlens, plan.max_seqlen).view(q.shape)
    if plan.backend == "flex":
        return compiled(_flex_attend, q.device.type)(q, k, v, plan.mask)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_attention(q, k, v, plan.mask).transpose(1, 2)


def scaled_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Run SDPA over (B, heads, L, D), causal if there is no mask."""
    if q.is_meta:
        return _ShapesOfAttention.apply(q, k, v, mask)
    with _prefer_fastest(q):
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def _prefer_fastest(q: Tensor) -> contextlib.AbstractContextManager[None]:
    """Let SDPA take the first kernel of SDPA_ORDER that can run."""
    return sdpa_kernel(SDPA_ORDER, set_priority=True) if q.device.type == "cuda" else contextlib.nullcontext()


def document_mask(document_ids: Tensor) -> Tensor:
    """Return the mask (B, 1, L, L) of the keys (last dimension) that a query sees: up to itself, in its document."""
    return (document_ids[:, :, None] == document_ids[:, None, :]).tril().unsqueeze(1)


def document_cu_seqlens(
    shape: torch.Size, document_ids: Tensor | None, device: torch.device, most_documents: int | None = None
) -> tuple[Tensor, int]:
    """Return where each document begins in the B·L tokens, then their end, int32; and the longest document's length.

    Where it is known that no row has more than `most_documents`, nothing waits for the GPU: each row has so many then,
    the last of them empty, and the length is at most L.
    """
    batch, length = shape
    if document_ids is None:
        return torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device), length
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    if most_documents is not None:
        earlier = first.cumsum(1).unsqueeze(-1) <= torch.arange(most_documents, device=device)  # than each document
        starts = earlier.sum(1) + length * torch.arange(batch, device=device).unsqueeze(1)
        return F.pad(starts.flatten(), (0, 1), value=batch * length).int(), length
    cu_seqlens = F.pad(first.flatten().nonzero().flatten(), (0, 1), value=batch * length).int()
    return cu_seqlens, int(cu_seqlens.diff().max())


@functools.cache
def has_varlen() -> bool:
    """Return whether this torch has `torch.nn.attention.varlen` (2.10 or newer)."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


@functools.cache
def _varlen() -> Callable[..., Tensor]:
    """Return torch's varlen attention; its arguments for causal masks and grouped heads differ between versions."""
    if not has_varlen():
        raise ImportError(f"attention: torch must have nn.attention.varlen (2.10 or newer), got {torch.__version__}")
    from torch.nn.attention.varlen import varlen_attn

    run_varlen: Callable[..., Any] = varlen_attn
    known = inspect.signature(run_varlen).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = "enable_gqa" in known

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1 and not grouped:
            k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
        extra = {"enable_gqa": True} if repeats > 1 and grouped else {}
        return run_varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options, **extra)

    return run


@functools.cache
def _flash() -> Callable[..., Tensor]:
    if importlib.util.find_spec("flash_attn") is None:
        raise ImportError("attention: flash-attn must be installed (pip install yaongi[peers]), got none")
    from flash_attn import flash_attn_varlen_func

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        same_bits = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True, deterministic=same_bits
        )

    return run


def _flex_attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Do what `attend` does. The transposes are compiled too: outside they would cost a copy of the gradient."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    options: Any = FLEX_OPTIONS if q.device.type == "cuda" else None
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options).transpose(1, 2)


def _flex_mask(shape: torch.Size, document_ids: Tensor | None, device: torch.device) -> BlockMask:
    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        causal = query >= key
        return causal if document_ids is None else causal & (document_ids[b, query] == document_ids[b, key])

    batch, length = shape
    rows = None if document_ids is None else batch
    return compiled(create_block_mask, device.type)(visible, rows, None, length, length, device=device)


class _ShapesOfAttention(torch.autograd.Function):
    """Attention on the meta device that saves what fused kernels save, the output and each query's log-sum.

    torch's own formula would save every probability there, and so inflate the count of activations.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(q)
        logsum = q.new_empty(q.shape[:-1], dtype=torch.float32)
        kept = () if mask is None else (torch.empty_like(mask, dtype=q.dtype),)
        ctx.save_for_backward(q, k, v, out, logsum, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors[:3]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
