"""The loss: next-token cross entropy in chunks of tokens, so that memory never holds all logits at once."""

from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from yaongi.kernels import cross_entropy, cross_entropy_backward
from yaongi.model.layers.accumulation import accumulate_product, accumulation_target

Tensor = torch.Tensor
NO_TARGET = -1
CHUNK_LOGITS = 2**27  # logits in memory at once, plus as many gradients: 0.5 GB together in bfloat16
CACHED_LOGITS = 2**21  # the same on a CPU, where passes over more than its cache holds take twice as long
CACHED_TOKENS = 256  # at least, since each chunk reads and writes the weight's gradient


class TokenLosses(NamedTuple):
    """The loss of each token of a micro-batch, for objectives that are no sum over them."""

    cross_entropy: Tensor  # (B, L), nats, 0 where there is no target
    balance: Tensor  # as in `Losses`
    loads: Tensor  # as in `Losses`


class Losses(NamedTuple):
    """Sums over one micro-batch, for exact accumulation over several."""

    cross_entropy_sum: Tensor  # scalar, nats, summed over the targets
    z_sum: Tensor  # scalar, Σ logsumexp² over the targets
    balance: Tensor  # scalar, the sequence balance loss, averaged over rows and summed over expert layers, unweighted
    targets: Tensor  # scalar int64, number of targets
    loads: Tensor  # (expert layers, E) int32, tokens that each expert got


def next_tokens(input_ids: Tensor, document_ids: Tensor | None) -> Tensor:
    """Return the token after each one in its document, (B, L); NO_TARGET where there is none."""
    following = input_ids[:, 1:]
    if document_ids is not None:
        following = following.masked_fill(document_ids[:, 1:] != document_ids[:, :-1], NO_TARGET)
    return torch.nn.functional.pad(following, (0, 1), value=NO_TARGET)


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    upstream: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return Σ −log p(target) and Σ logsumexp² of the logits hidden·weightᵀ over the tokens that have a target.

    The backward pass recomputes the logits: four products. With `upstream` all gradients are formed here, while the
    logits are at hand: three products. Then one backward pass must follow, since under `fused_accumulation` the
    weight's gradient is added here already; if it comes with other gradients than `upstream`, it returns NaN.

    Args:
        hidden: (T, d).
        weight: (V, d).
        targets: (T) int64, NO_TARGET or any other negative number (−100, say) where there is none.
        chunk: tokens whose logits are in memory at once; by default as many as have CHUNK_LOGITS
            logits, on a CPU CACHED_LOGITS.
        upstream: the gradients with which the backward pass will come to the two results, scalars of their dtype.

    Returns:
        Two scalars in float32 (float64 for float64 inputs).
    """
    chunk = chunk or _chunk(len(weight), weight.device)
    gradient = accumulation_target(weight) if isinstance(weight, torch.nn.Parameter) else None
    if upstream is not None and torch.is_grad_enabled():
        return _HeadCrossEntropyAhead.apply(hidden, weight, targets, chunk, gradient, *upstream)
    losses, normalizers = _HeadCrossEntropy.apply(hidden, weight, targets, chunk, gradient)
    return _sums(losses, normalizers, targets)


def module_cross_entropy(
    hidden: Tensor, head: torch.nn.Module, targets: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Do what `head_cross_entropy` does, for a head that is any module: its logits are recomputed chunk by chunk."""
    return _sums(*_module_cross_entropy(hidden, head, targets, vocab_size), targets)


def head_token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Return −log p(target) of each token (T,), 0 where there is none: `head_cross_entropy` before its sum.

    In float32 (float64 for float64 inputs); arguments as there. The backward pass recomputes the logits.
    """
    gradient = accumulation_target(weight) if isinstance(weight, torch.nn.Parameter) else None
    return _HeadCrossEntropy.apply(hidden, weight, targets, chunk or _chunk(len(weight), weight.device), gradient)[0]


def module_token_losses(hidden: Tensor, head: torch.nn.Module, targets: Tensor, vocab_size: int) -> Tensor:
    """Do what `head_token_losses` does, for a head that is any module."""
    return _module_cross_entropy(hidden, head, targets, vocab_size)[0]


def _module_cross_entropy(
    hidden: Tensor, head: torch.nn.Module, targets: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return each token's loss and logsumexp, (T,); the logits are recomputed chunk by chunk."""

    def part(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(head(rows), labels)

    chunk = _chunk(vocab_size, hidden.device)
    parts = [
        checkpoint(part, rows, labels, use_reentrant=False)
        for rows, labels in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    losses, normalizers = (torch.cat(each) for each in zip(*parts, strict=True))
    return losses, normalizers


class _HeadGradients:
    """The gradients of the loss, summed chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, into: Tensor | None) -> None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        self._weight, self._into = weight, into
        self._dweight = torch.zeros_like(weight, dtype=wide) if into is None else into
        self.dhidden = torch.empty_like(hidden)

    def add(
        self,
        part: slice,
        rows: Tensor,
        logits: Tensor,
        targets: Tensor,
        normalizers: Tensor,
        dlosses: Tensor,
        dnormalizers: Tensor,
    ) -> None:
        """Add those of the tokens `part`, from the gradients of their losses and logsumexps."""
        dlogits = cross_entropy_backward(dlosses, dnormalizers, logits, targets, normalizers)
        torch.mm(dlogits, self._weight, out=self.dhidden[part])
        accumulate_product(self._dweight, dlogits.T, rows)

    @property
    def dweight(self) -> Tensor | None:
        """The weight's gradient in its dtype; None where it was added into another tensor."""
        return self._dweight.to(self._weight.dtype) if self._into is None else None


def _chunk(vocab_size: int, device: torch.device) -> int:
    """Return the tokens whose logits are in memory at once."""
    if device.type == "cpu":
        return max(CACHED_TOKENS, CACHED_LOGITS // vocab_size)
    return max(1, CHUNK_LOGITS // vocab_size)


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, max(1, tokens), chunk)]


def _sums(losses: Tensor, normalizers: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return losses.sum(), torch.where(targets < 0, 0, normalizers.square()).sum()


class _HeadCrossEntropy(torch.autograd.Function):
    """Each token's loss and logsumexp, chunk by chunk. No logits are saved: forward and backward both compute them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, gradient: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        parts = _chunks(len(hidden), chunk)
        results = [cross_entropy(hidden[part] @ weight.T, targets[part]) for part in parts]
        losses, normalizers = (torch.cat(each) for each in zip(*results, strict=True))
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.parts, ctx.gradient = parts, gradient
        return losses, normalizers

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor, dnormalizers: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        gradients = _HeadGradients(hidden, weight, ctx.gradient)
        for part in ctx.parts:
            rows = hidden[part]
            gradients.add(
                part, rows, rows @ weight.T, targets[part], normalizers[part], dlosses[part], dnormalizers[part]
            )
        return gradients.dhidden, gradients.dweight, None, None, None


class _HeadCrossEntropyAhead(torch.autograd.Function):
    """The loss chunk by chunk, with its gradients: the backward pass only hands them on."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        gradient: Tensor | None,
        dloss: Tensor,
        dsquares: Tensor,
    ) -> tuple[Tensor, Tensor]:
        gradients = _HeadGradients(hidden, weight, gradient)
        losses, logsums = [], []
        for part in _chunks(len(hidden), chunk):
            rows, labels = hidden[part], targets[part]
            logits = rows @ weight.T
            loss, logsum = cross_entropy(logits, labels)
            dnormalizers = torch.where(labels < 0, 0, 2 * dsquares * logsum)
            gradients.add(part, rows, logits, labels, logsum, dloss.expand_as(logsum), dnormalizers)
            losses.append(loss)
            logsums.append(logsum)
        ctx.save_for_backward(gradients.dhidden, gradients.dweight, dloss, dsquares)
        return _sums(torch.cat(losses), torch.cat(logsums), targets)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, dsquares: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight, *upstream = ctx.saved_tensors
        as_told = (dloss == upstream[0]) & (dsquares == upstream[1])
        factor = torch.where(as_told, 1.0, torch.nan)  # no wait for the device: NaN stops the step
        return dhidden * factor, None if dweight is None else dweight * factor, *[None] * 5
