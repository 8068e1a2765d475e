"""The Newton-Schulz steps on a GPU over normalised float16 matrices: the products, their order and their memory.

Every tensor here is a batch: X (B, m, n) with m ≤ n, or m × m matrices. The latter are polynomials of R, so they are
symmetric and commute; rounded, they do so only approximately, and the order of factors matters (README.md): with
(aI + Z)·W for W·(aI + Z), where W = (aI + Z)·R, errors are ten times as large. R is stored as GRAM_SCALE·R, which keeps
its small entries out of float16's subnormals; a power of two adds no rounding error.

A `Product` writes α·X·Y + β·C for a symmetric Y, or α·X·Xᵀ + β·C for Y = None. There are two: torch's, and the CUDA
kernel that computes only half of the result.
"""

from collections.abc import Callable

import torch

from yaongi.kernels.newton_schulz.reference import GRAM_SCALE, RESTART, Steps

Tensor = torch.Tensor
Product = Callable[[Tensor, Tensor | None, Tensor | None, float, float, Tensor], None]
STORAGE = torch.float16  # bfloat16's eight bits are too few for the Gram form
SQUARES = 4  # m × m matrices that the Gram form holds at a time


def torch_product(x: Tensor, y: Tensor | None, c: Tensor | None, alpha: float, beta: float, out: Tensor) -> None:
    """Compute the full product with torch; without C, β = 0 and the addend isn't read."""
    addend, beta = (out, 0) if c is None else (c, beta)
    torch.baddbmm(addend, x, x.mT if y is None else y, beta=beta, alpha=alpha, out=out)


def bytes_per_matrix(m: int, n: int) -> int:
    """Return the bytes that `iterate` and its caller hold per matrix: X twice, and SQUARES m × m matrices."""
    return STORAGE.itemsize * (2 * m * n + SQUARES * m * m)


def iterate(x: Tensor, scratch: Tensor, steps: Steps, form: str, product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """Run all steps on X, (B, m, n), except for the last product: the result is Q·X.

    Args:
        x: overwritten.
        scratch: like x, overwritten.

    Returns:
        Q (B, m, m), X (B, m, n), and scratch memory like X.
    """
    square = (x.shape[0], x.shape[1], x.shape[1])
    squares = [x.new_empty(square) for _ in range(SQUARES if form == "gram" else 2)]
    parts = [steps[:RESTART], steps[RESTART:]] if form == "gram" else [[step] for step in steps]
    first, *rest = (part for part in parts if part)
    q = _factor(x, first, squares, product)
    for part in rest:
        torch.bmm(q, x, out=scratch)
        x, scratch = scratch, x
        q = _factor(x, part, squares, product)
    return q, x, scratch


def _factor(x: Tensor, steps: Steps, squares: list[Tensor], product: Product) -> Tensor:
    """Return Q, the product of the steps' factors aI + Z with Z = bR + cR² and R = XXᵀ; it overwrites `squares`."""
    q: Tensor
    free = list(squares)
    product(x, None, None, GRAM_SCALE, 0.0, gram := free.pop())
    for number, (a, b, c) in enumerate(steps):
        product(gram, gram, gram, c / GRAM_SCALE**2, b / GRAM_SCALE, z := free.pop())
        if number + 1 < len(steps):
            product(z, gram, gram, 1.0, a, w := free.pop())  # (aI + Z)·R
            product(w, z, w, 1.0, a, gram)  # (aI + Z)·R·(aI + Z)
            free.append(w)
        if number == 0:
            z.diagonal(dim1=-2, dim2=-1).add_(a)  # turn Z, not needed again, into the first factor aI + Z
            q = z
        else:
            product(q, z, q, 1.0, a, target := free.pop())
            free += [q, z]
            q = target
    return q
