"""The loss: next-token cross entropy in chunks of tokens, so that memory never holds all logits at once."""

from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from yaongi.kernels import cross_entropy, cross_entropy_backward
from yaongi.model.layers.accumulation import accumulate_product, accumulation_target

Tensor = torch.Tensor
NO_TARGET = -1
CHUNK_LOGITS = 2**27  # logits in memory at once, plus as many gradients: 0.5 GB together in bfloat16


class Losses(NamedTuple):
    """Sums over one micro-batch, for exact accumulation over several."""

    cross_entropy_sum: Tensor  # scalar, nats, summed over the targets
    z_sum: Tensor  # scalar, Σ logsumexp² over the targets
    balance: Tensor  # scalar, the sequence balance loss, averaged over rows and summed over expert layers, unweighted
    targets: Tensor  # scalar int64, number of predicted tokens
    loads: Tensor  # (expert layers, E) int32, tokens that each expert got


def next_tokens(input_ids: Tensor, document_ids: Tensor | None) -> Tensor:
    """Return the token after each one in its document, (B, L); NO_TARGET where there is none."""
    following = input_ids[:, 1:]
    if document_ids is not None:
        following = following.masked_fill(document_ids[:, 1:] != document_ids[:, :-1], NO_TARGET)
    return torch.nn.functional.pad(following, (0, 1), value=NO_TARGET)


def head_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return Σ −log p(target) and Σ logsumexp² of the logits hidden·weightᵀ over the tokens that have a target.

    The backward pass recomputes the logits.

    Args:
        hidden: (T, d).
        weight: (V, d).
        targets: (T) int64, NO_TARGET or any other negative number (−100, say) where there is none.
        chunk: tokens whose logits are in memory at once; by default as many as have CHUNK_LOGITS logits.

    Returns:
        Two scalars in float32 (float64 for float64 inputs).
    """
    chunk = chunk or max(1, CHUNK_LOGITS // weight.shape[0])
    gradient = accumulation_target(weight) if isinstance(weight, torch.nn.Parameter) else None
    return _HeadCrossEntropy.apply(hidden, weight, targets, chunk, gradient)


def module_cross_entropy(
    hidden: Tensor, head: torch.nn.Module, targets: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Do what `head_cross_entropy` does, for a head that is any module: its logits are recomputed chunk by chunk."""

    def part(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses, normalizers = cross_entropy(head(rows), labels)
        return losses.sum(), torch.where(labels < 0, 0, normalizers.square()).sum()

    chunk = max(1, CHUNK_LOGITS // vocab_size)
    parts = [
        checkpoint(part, rows, labels, use_reentrant=False)
        for rows, labels in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    losses, squares = (torch.stack(sums).sum() for sums in zip(*parts, strict=True))
    return losses, squares


class _HeadCrossEntropy(torch.autograd.Function):
    """The loss chunk by chunk. No logits are saved, so forward and backward both compute the product with the head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, gradient: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        results = [
            cross_entropy(rows @ weight.T, labels)
            for rows, labels in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        losses, normalizers = (torch.cat(parts) for parts in zip(*results, strict=True))
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.chunk, ctx.gradient = chunk, gradient
        return losses.sum(), torch.where(targets < 0, 0, normalizers.square()).sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, dsquares: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        dlosses = dloss.expand_as(normalizers)
        dnormalizers = torch.where(targets < 0, 0, 2 * dsquares * normalizers)
        dhidden = torch.empty_like(hidden)
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros_like(weight, dtype=wide) if ctx.gradient is None else ctx.gradient
        for start in range(0, max(1, len(hidden)), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            rows = hidden[part]
            dlogits = cross_entropy_backward(
                dlosses[part], dnormalizers[part], rows @ weight.T, targets[part], normalizers[part]
            )
            torch.mm(dlogits, weight, out=dhidden[part])
            accumulate_product(total, dlogits.T, rows)
        return dhidden, total.to(weight.dtype) if ctx.gradient is None else None, None, None, None
