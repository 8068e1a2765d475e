"""`cross_entropy`: registration and the public function."""

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.cross_entropy.reference import cross_entropy_backward_reference, cross_entropy_reference

Tensor = torch.Tensor


def _fake(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses, normalizers = (logits.new_empty(logits.shape[0], dtype=wide) for _ in range(2))
    return losses, normalizers


def _backward_fake(
    dlosses: Tensor, dnormalizers: Tensor, logits: Tensor, targets: Tensor, normalizers: Tensor
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, dlosses: Tensor, dnormalizers: Tensor):  # type: ignore[no-untyped-def]
    return cross_entropy_backward(dlosses, dnormalizers, *ctx.saved_tensors), None


def _value_check(logits: Tensor, targets: Tensor) -> None:
    check.finite("cross_entropy", logits=logits)
    if targets.numel() and int(targets.max()) >= logits.shape[1]:
        raise ValueError(f"cross_entropy: targets must be below {logits.shape[1]} (V), got {int(targets.max())}")


_op = backend.define(
    "cross_entropy(Tensor logits, Tensor targets) -> (Tensor losses, Tensor normalizers)",
    reference=cross_entropy_reference,
    fake=_fake,
    triton="yaongi.kernels.cross_entropy.loss_kernels:cross_entropy_triton",
    value_check=_value_check,
)
cross_entropy_backward = backend.define(
    "cross_entropy_backward(Tensor dlosses, Tensor dnormalizers, Tensor logits, Tensor targets, Tensor normalizers) "
    "-> Tensor",
    reference=cross_entropy_backward_reference,
    fake=_backward_fake,
    triton="yaongi.kernels.cross_entropy.loss_kernels:cross_entropy_backward_triton",
)
backend.define_autograd("cross_entropy", _backward, _setup_context)
backend.define_no_autograd("cross_entropy_backward")


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return −log softmax(logits)[target] of each token, and the logarithm of its softmax's normalizer.

    Args:
        logits: (T, V), V ≥ 1, any float, unit stride along V.
        targets: (T) int32 or int64; below 0 where a token has no target: its loss is 0.

    Returns:
        losses (T) and normalizers (T), float32, or float64 for float64 logits. Both have gradients.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape or stride. IndexError or RuntimeError: on the CPU, a
            target of V or more; on a GPU its loss is NaN.
    """
    args = check.Arguments("cross_entropy")
    args.tensor("logits", logits, ("T", "V"), unit_stride=True)
    args.tensor("targets", targets, ("T",), (torch.int32, torch.int64))
    args.require(logits.shape[1] > 0, "logits", "(T, V) with V of 1 or more", tuple(logits.shape))
    return _op(logits, targets)
