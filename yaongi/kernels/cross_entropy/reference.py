"""Cross entropy in plain torch; README.md in this folder has the mathematics."""

import torch

Tensor = torch.Tensor


def cross_entropy_reference(
    logits: Tensor,  # (T, V)
    targets: Tensor,  # (T), below 0 where a token has no target
) -> tuple[Tensor, Tensor]:  # (T), (T), at least float32
    """Return the losses and the normalizers n."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normalizers = wide.logsumexp(-1)
    picked = wide.gather(-1, targets.long().clamp(min=0)[:, None])[:, 0]
    return torch.where(targets < 0, 0, normalizers - picked), normalizers


def cross_entropy_backward_reference(
    dlosses: Tensor,  # (T)
    dnormalizers: Tensor,  # (T)
    logits: Tensor,  # (T, V)
    targets: Tensor,  # (T)
    normalizers: Tensor,  # (T)
) -> Tensor:  # (T, V) in the logits' dtype
    """Return the gradient of the logits."""
    dlosses = torch.where(targets < 0, 0, dlosses.to(normalizers.dtype))
    dlogits = (logits.to(normalizers.dtype) - normalizers[:, None]).exp_().mul_((dlosses + dnormalizers)[:, None])
    dlogits.scatter_add_(-1, targets.long().clamp(min=0)[:, None], -dlosses[:, None])
    return dlogits.to(logits.dtype)
