"""`likeliest`: registration and the public function."""

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.likeliest.reference import likeliest_reference

Tensor = torch.Tensor


def _fake(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


_op = backend.define(
    "likeliest(Tensor logits) -> Tensor",
    reference=likeliest_reference,
    fake=_fake,
    triton="yaongi.kernels.likeliest.two_stages:likeliest_triton",
)


@torch.no_grad()
def likeliest(logits: Tensor) -> Tensor:
    """Return the likeliest token of each row; of equally likely ones that with the smallest id.

    Args:
        logits: (B, V), any float, V ≥ 1; −∞ for tokens that must not come.

    Returns:
        (B,) int64, −1 for a row of which no logit is finite, or one is NaN or +∞.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape.
    """
    args = check.Arguments("likeliest")
    args.tensor("logits", logits, ("B", "V"))
    args.require(logits.shape[1] >= 1, "logits", "(B, V) with V >= 1", tuple(logits.shape))
    return _op(logits)
