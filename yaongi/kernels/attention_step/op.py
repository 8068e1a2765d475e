"""`attention_step`: registration and the public function."""

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.attention_step.reference import attention_step_reference

Tensor = torch.Tensor
MOST_HEADS, WIDEST = 16, 256  # heads per key head, and width of a head, that the kernel takes


def _fake(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, visible: Tensor, place: Tensor, length: int
) -> Tensor:
    return q.new_empty(q.shape)


def _value_check(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *rest: object) -> None:
    check.finite("attention_step", q=q, k=k, v=v, keys=keys, values=values)


def _triton_refuses(q: Tensor, k: Tensor, *rest: object) -> str | None:
    if q.dtype not in check.HALF_DTYPES:
        return f"it takes float16 and bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    shared, width = q.shape[1] // max(1, k.shape[1]), q.shape[2]
    if shared > MOST_HEADS:
        return f"it takes up to {MOST_HEADS} heads per key head, got {shared}"
    return f"it takes heads of up to {WIDEST}, got {width}" if width > WIDEST else None


_op = backend.define(
    "attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor visible, Tensor place, "
    "int length) -> Tensor",
    reference=attention_step_reference,
    fake=_fake,
    triton="yaongi.kernels.attention_step.cached_attention:attention_step_triton",
    triton_refuses=_triton_refuses,
    value_check=_value_check,
)


@torch.no_grad()
def attention_step(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, visible: Tensor, place: Tensor, length: int
) -> Tensor:
    """Add one token's key and value to each row of a cache, and attend to it; it has no gradient.

    Each key head serves H / J heads. A row attends to its own token and to the visible places before it.

    Args:
        q: (B, H, D), any float.
        k, v: (B, J, D), q's dtype, J a divisor of H.
        keys, values: (B, J, S, D), q's dtype, the cache, updated in place.
        visible: (B, S) bool, the places that a row may attend to; that of its token is one, those after it are not.
        place: (B) int64, where each row's token goes, below `length`.
        length: 1 to S, the places to look at.

    Returns:
        y (B, H, D) in q's dtype, contiguous: softmax(q·keyᵀ / √D)·values.

    Raises:
        TypeError: kind, dtype or device. ValueError: shape or value.
    """
    args = check.Arguments("attention_step")
    args.tensor("q", q, ("B", "H", "D"))
    for name, value in (("k", k), ("v", v)):
        args.tensor(name, value, ("B", "J", "D"), (q.dtype,))
    heads, shared = args.sizes["H"], args.sizes["J"]
    args.require(shared > 0 and heads % shared == 0, "k", f"(B, J, D) with J a divisor of {heads} (H)", tuple(k.shape))
    for name, value in (("keys", keys), ("values", values)):
        args.tensor(name, value, ("B", "J", "S", "D"), (q.dtype,), written=True)
    args.tensor("visible", visible, ("B", "S"), (torch.bool,))
    args.tensor("place", place, ("B",), (torch.int64,))
    args.integer("length", length, 1, args.sizes["S"], " (S)")
    return _op(q, k, v, keys, values, visible, place, length)
