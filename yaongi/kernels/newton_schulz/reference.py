"""Newton-Schulz and the Teon update in plain torch: see README.md beside this file for the mathematics.

m rows, n columns; the iteration works on wide matrices, m ≤ n, and transposes tall ones on the way in and out. With
`storage` the matrices that a GPU keeps in memory between two products are rounded and mirrored as it does that: with
float16 this is the plain computation that the kernels are held to.
"""

import math
from collections.abc import Callable

import torch

Tensor = torch.Tensor
Steps = list[tuple[float, float, float]]  # (a, b, c) of each
RESTART = 2  # the Gram form builds the Gram matrix anew after this many steps
GRAM_SCALE = 2.0**12  # of the stored Gram matrix: its entries reach 4, and its small ones would be subnormal
DIRECTION = torch.bfloat16  # what a GPU stores U in before its norm is known: float32's range in half the bytes


def triples(coefficients: list[float]) -> Steps:
    """(a, b, c) of each step from a flat list."""
    return list(zip(coefficients[0::3], coefficients[1::3], coefficients[2::3], strict=True))


def rounding(storage: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """Round to `storage` and back; nothing for None."""
    return lambda t: t if storage is None else t.to(storage).to(t.dtype)


def symmetric_rounding(storage: torch.dtype | None, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """As `rounding` of the scaled matrix, of which only the lower triangle is computed, and mirrored."""
    if storage is None:
        return lambda t: t
    return lambda t: (scale * (t.tril() + t.tril(-1).mT)).to(storage).to(t.dtype) / scale


def _normalised(x: Tensor) -> Tensor:
    """X/‖X‖_F without overflow or underflow of the squares; a zero matrix stays zero."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    return x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1)  # the norm is ≥ 1 unless X = 0


def _standard(x: Tensor, steps: Steps, storage: torch.dtype | None) -> Tensor:
    """X ← (aI + bA + cA²)·X with A = XXᵀ."""
    stored, stored_z = rounding(storage), symmetric_rounding(storage)
    stored_gram = symmetric_rounding(storage, GRAM_SCALE)
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for a, b, c in steps:
        gram = stored_gram(x @ x.mT)
        x = stored(stored(a * identity + stored_z(b * gram + c * gram @ gram)) @ x)
    return x


def _gram(x: Tensor, steps: Steps, storage: torch.dtype | None) -> Tensor:
    """The same polynomials on the m × m matrices alone: X is touched before and after each part."""
    stored, stored_zq = rounding(storage), symmetric_rounding(storage)
    stored_gram = symmetric_rounding(storage, GRAM_SCALE)
    for part in (steps[:RESTART], steps[RESTART:]):
        gram = stored_gram(x @ x.mT)  # R
        q = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device).expand_as(gram)
        for a, b, c in part:
            z = stored_zq(b * gram + c * gram @ gram)
            q = stored_zq(a * q + q @ z)
            gram = stored_gram(a * gram + z @ gram)  # (aI + Z)·R
            gram = stored_gram(a * gram + gram @ z)  # (aI + Z)·R·(aI + Z)
        x = stored(q @ x)
    return x


def newton_schulz_reference(
    x: Tensor,  # (…, m, n)
    coefficients: list[float],
    form: str,
    storage: torch.dtype | None = None,
) -> Tensor:
    """The steps applied to X/‖X‖_F, in x's dtype but at least float32; rounded once, at the end."""
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
    masters: list[Tensor],  # empty: the parameters are their own masters
    stack: int,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    coefficients: list[float],
    storage: torch.dtype | None = None,
) -> None:
    """M ← μM + G, O = NewtonSchulz([U₁|…|U_K]), W_k ← (1 − ηλ)·W_k − η·sqrt(m/n)·O_k, in place."""
    if not params[0].numel():
        return
    m, n = params[0].shape[-2:]
    weights = masters or params
    for first in range(0, len(params), stack):
        layers = range(first, first + stack)
        directions = [teon_direction(grads[i], momenta[i], momentum, nesterov) for i in layers]
        joint = rounding(storage and DIRECTION)(torch.cat(directions, -1))
        stacked = newton_schulz_reference(joint, coefficients, "gram", storage)
        for i, o in zip(layers, stacked.split(n, -1), strict=True):
            weight = weights[i].to(torch.promote_types(weights[i].dtype, torch.float32))
            weights[i].copy_(teon_weight(weight, o, (m, n), lr, weight_decay))
            if masters:
                params[i].copy_(weights[i])


def teon_direction(grad: Tensor, buffer: Tensor, momentum: float, nesterov: bool = True) -> Tensor:
    """Move one momentum M ← μM + G in place, and return the direction U: G + μM with Nesterov, else M."""
    wide = torch.promote_types(torch.promote_types(grad.dtype, buffer.dtype), torch.float32)
    grad = grad.to(wide)
    accumulated = momentum * buffer.to(wide) + grad
    buffer.copy_(accumulated)
    return grad + momentum * accumulated if nesterov else accumulated


def teon_weight(weight: Tensor, o: Tensor, shape: tuple[int, int], lr: float, weight_decay: float) -> Tensor:
    """(1 − ηλ)·W − η·sqrt(m/n)·O of all rows of W or some; `shape` (m, n) is that of the whole matrix."""
    m, n = shape
    return (1 - lr * weight_decay) * weight - lr * math.sqrt(m / n) * o
