"""Newton-Schulz and the Teon update in plain torch; README.md in this folder has the mathematics.

A matrix has m rows and n columns. The iteration works on wide matrices, m ≤ n; tall ones are transposed before and
after it. With `storage`, the matrices that a GPU stores between two products are rounded and mirrored as the kernels do
it; with float16 this is the computation that the kernels are tested against.
"""

import math
from collections.abc import Callable

import torch

Tensor = torch.Tensor
Steps = list[tuple[float, float, float]]  # (a, b, c) of each
RESTART = 2  # the Gram form recomputes the Gram matrix from X after this many steps
GRAM_SCALE = 2.0**12  # of the stored Gram matrix: its entries reach 4, and unscaled small ones would be subnormal
DIRECTION = torch.bfloat16  # dtype of U on a GPU until its norm is known: float32's range in half the bytes


def triples(coefficients: list[float]) -> Steps:
    """Return (a, b, c) of each step from a flat list."""
    return list(zip(coefficients[0::3], coefficients[1::3], coefficients[2::3], strict=True))


def rounding(storage: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """Return a function that rounds to `storage` and back, or does nothing for None."""
    return lambda t: t if storage is None else t.to(storage).to(t.dtype)


def symmetric_rounding(storage: torch.dtype | None, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Return a function that mirrors the lower triangle and rounds `scale` times the matrix, as `rounding` does."""
    if storage is None:
        return lambda t: t
    return lambda t: (scale * (t.tril() + t.tril(-1).mT)).to(storage).to(t.dtype) / scale


def _normalised(x: Tensor) -> Tensor:
    """Return X/‖X‖_F without overflow or underflow of the squares; a zero matrix stays zero."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    return x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1)  # the norm is ≥ 1 unless X = 0


def _standard(x: Tensor, steps: Steps, storage: torch.dtype | None) -> Tensor:
    """Compute X ← (aI + bA + cA²)·X with A = XXᵀ in each step."""
    stored, stored_z = rounding(storage), symmetric_rounding(storage)
    stored_gram = symmetric_rounding(storage, GRAM_SCALE)
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for a, b, c in steps:
        gram = stored_gram(x @ x.mT)
        x = stored(stored(a * identity + stored_z(b * gram + c * gram @ gram)) @ x)
    return x


def _gram(x: Tensor, steps: Steps, storage: torch.dtype | None) -> Tensor:
    """Compute the same polynomials on m × m matrices; X enters only at the start and end of each part."""
    stored, stored_zq = rounding(storage), symmetric_rounding(storage)
    stored_gram = symmetric_rounding(storage, GRAM_SCALE)
    for part in (steps[:RESTART], steps[RESTART:]):
        gram = stored_gram(x @ x.mT)  # R
        identity, q = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device), None
        for i, (a, b, c) in enumerate(part, 1):
            z = stored_zq(b * gram + c * gram @ gram)
            q = stored_zq(a * identity + z if q is None else a * q + q @ z)
            if i < len(part):
                gram = stored_gram(a * gram + z @ gram)  # (aI + Z)·R
                gram = stored_gram(a * gram + gram @ z)  # (aI + Z)·R·(aI + Z)
        x = x if q is None else stored(q @ x)
    return x


def newton_schulz_reference(
    x: Tensor,  # (…, m, n)
    coefficients: list[float],
    form: str,
    storage: torch.dtype | None = None,
) -> Tensor:
    """Apply the steps to X/‖X‖_F in x's dtype but at least float32; round once, at the end."""
    if not x.numel():
        return x.new_empty(x.shape)
    tall = x.shape[-2] > x.shape[-1]
    wide = rounding(storage)(_normalised(x.to(torch.promote_types(x.dtype, torch.float32))))
    wide = (_gram if form == "gram" else _standard)(wide.mT if tall else wide, triples(coefficients), storage)
    return (wide.mT if tall else wide).to(x.dtype).contiguous()


def teon_update_reference(
    params: list[Tensor],  # (m, n) or (E, m, n) each
    grads: list[Tensor],
    momenta: list[Tensor],
    masters: list[Tensor],  # float32 master weights; empty: the parameters take the update
    stack: int,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    coefficients: list[float],
    active: Tensor | None = None,  # (stacks, E) or (stacks) bool: what to update; None: everything
    storage: torch.dtype | None = None,
) -> None:
    """Update in place: M ← μM + G, O = NewtonSchulz([U₁|…|U_K]), W_k ← (1 − ηλ)·W_k − η·sqrt(m/n)·O_k."""
    if not params[0].numel():
        return
    m, n = params[0].shape[-2:]
    weights = masters or params
    masks = [None if active is None else active[i // stack] for i in range(len(params))]
    directions = [
        teon_direction(grad, buffer, momentum, nesterov, mask)
        for grad, buffer, mask in zip(grads, momenta, masks, strict=True)
    ]
    joint = torch.stack([torch.cat(directions[i : i + stack], -1) for i in range(0, len(params), stack)])
    stacked = newton_schulz_reference(rounding(storage and DIRECTION)(joint), coefficients, "gram", storage)
    updates = [o for joint_o in stacked for o in joint_o.split(n, -1)]
    for i, (weight, o, mask) in enumerate(zip(weights, updates, masks, strict=True)):
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        weight.copy_(teon_weight(wide, o, (m, n), lr, weight_decay, mask))
        if masters:
            params[i].copy_(_chosen(mask, weight, params[i]))


def teon_direction(
    grad: Tensor, buffer: Tensor, momentum: float, nesterov: bool = True, active: Tensor | None = None
) -> Tensor:
    """Update one momentum buffer M ← μM + G in place; return the direction U: G + μM with Nesterov, else M.

    Args:
        active: (E) or scalar, bool: the matrices to update; the others keep their M, and their U is 0.
    """
    wide = torch.promote_types(torch.promote_types(grad.dtype, buffer.dtype), torch.float32)
    grad = grad.to(wide)
    accumulated = momentum * buffer.to(wide) + grad
    buffer.copy_(_chosen(active, accumulated, buffer))
    return _chosen(active, grad + momentum * accumulated if nesterov else accumulated, 0)


def _chosen(active: Tensor | None, value: Tensor, other: Tensor | int) -> Tensor:
    """Return `value` for the active matrices, (E) or scalar, and `other` for the rest; None: all are active."""
    return value if active is None else torch.where(active[..., None, None], value, other)


def teon_weight(
    weight: Tensor, o: Tensor, shape: tuple[int, int], lr: float, weight_decay: float, active: Tensor | None = None
) -> Tensor:
    """Return (1 − ηλ)·W − η·sqrt(m/n)·O for some or all rows of W; W itself where it is not active, as above.

    Args:
        shape: (m, n) of the full matrix.
    """
    m, n = shape
    return _chosen(active, (1 - lr * weight_decay) * weight - lr * math.sqrt(m / n) * o, weight)
