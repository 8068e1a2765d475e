"""The loss: next-token cross entropy in chunks of tokens, so that float32 logits are never all alive at once."""

from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor
NO_TARGET = -1
CHUNK_LOGITS = 2**26  # logits alive at once: 256 MB in float32


class Losses(NamedTuple):
    """Sums over one micro-batch, for exact accumulation over several."""

    cross_entropy_sum: Tensor  # scalar, nats, summed over the targets
    z_sum: Tensor  # scalar, Σ logsumexp² over the targets
    balance: Tensor  # scalar, the sequence balance loss, averaged over rows and summed over expert layers, unweighted
    targets: Tensor  # scalar int64, how many tokens were predicted
    loads: Tensor  # (expert layers, E) int32, tokens of each expert


def next_tokens(input_ids: Tensor, document_ids: Tensor | None) -> Tensor:
    """(B, L) to (B, L): the token after each one in its document, NO_TARGET where there is none."""
    following = input_ids[:, 1:]
    if document_ids is not None:
        following = following.masked_fill(document_ids[:, 1:] != document_ids[:, :-1], NO_TARGET)
    return torch.nn.functional.pad(following, (0, 1), value=NO_TARGET)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Σ −log p(target) and Σ logsumexp² of the logits hidden·weightᵀ over the tokens that have a target.

    Args:
        hidden: (T, d). weight: (V, d). targets: (T) int64, NO_TARGET where there is none.
        chunk: tokens whose logits are alive at once; by default as many as make CHUNK_LOGITS of them.

    Returns:
        Two scalars in float32 (float64 for float64). The backward pass computes the logits again.
    """
    chunk = chunk or max(1, CHUNK_LOGITS // weight.shape[0])
    return _CrossEntropy.apply(hidden, weight, targets, chunk)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses, normalizers = [], []
        for rows, labels in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = (rows @ weight.T).to(wide)
            normalizers.append(logits.logsumexp(-1))
            picked = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            losses.append(torch.where(labels == NO_TARGET, 0, normalizers[-1] - picked).sum())
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(hidden, weight, targets, normalizer)
        ctx.chunk = chunk
        squares = torch.where(targets == NO_TARGET, 0, normalizer.square())
        return torch.stack(losses).sum(), squares.sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, dsquares: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, normalizer = ctx.saved_tensors
        has_target = targets != NO_TARGET
        share = torch.where(has_target, dloss + 2 * dsquares * normalizer, 0)  # of the softmax, in each token's dlogits
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=normalizer.dtype)
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            rows, labels = hidden[part], targets[part].clamp(min=0).unsqueeze(-1)
            logits = (rows @ weight.T).to(normalizer.dtype)
            dlogits = logits.sub_(normalizer[part, None]).exp_().mul_(share[part, None])
            dlogits.scatter_add_(-1, labels, torch.where(has_target[part, None], -dloss, 0))
            narrow = dlogits.to(hidden.dtype)
            dhidden[part] = narrow @ weight
            dweight += narrow.T @ rows
        return dhidden, dweight.to(weight.dtype), None, None
