"""The Newton-Schulz steps on a GPU, over normalised float16 matrices: which products, in which order, into what memory.

Every matrix here is a batch: X (B, m, n) with m ≤ n, and m × m ones. Those are polynomials of R, so all of them are
symmetric and commute; rounded, they only nearly do, and the order of the factors decides what becomes of the rest: with
Z·R·(aI + Z) for R·Z·(aI + Z) the singular values of the result are off by ten times as much. R is stored as
GRAM_SCALE·R, so that its small entries stay clear of float16's subnormals; a power of two costs nothing.

A `Product` writes α·X·Y + β·C for a symmetric Y, or α·X·Xᵀ + β·C for Y = None: torch's, or the CUDA kernel that
computes half of it.
"""

from collections.abc import Callable

import torch

from yaongi.kernels.newton_schulz.reference import GRAM_SCALE, RESTART, Steps

Tensor = torch.Tensor
Product = Callable[[Tensor, Tensor | None, Tensor | None, float, float, Tensor], None]
STORAGE = torch.float16  # bfloat16's eight bits are too few for the Gram form
SQUARES = 4  # m × m matrices that the Gram form needs at a time


def torch_product(x: Tensor, y: Tensor | None, c: Tensor | None, alpha: float, beta: float, out: Tensor) -> None:
    """The product by torch, in full; with β = 0 the addend isn't read."""
    addend, beta = (out, 0) if c is None else (c, beta)
    torch.baddbmm(addend, x, x.mT if y is None else y, beta=beta, alpha=alpha, out=out)


def bytes_per_matrix(m: int, n: int) -> int:
    """What `iterate` and its caller hold for one matrix: X twice, and the squares."""
    return STORAGE.itemsize * (2 * m * n + SQUARES * m * m)


def iterate(x: Tensor, scratch: Tensor, steps: Steps, form: str, product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """All steps on X, (B, m, n), but for the last product: Q, X and scratch memory like X; Q·X is the result.

    X's memory is used up, and that of `scratch`, a matrix like it.
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
    """Q, the product of the steps' factors aI + Z with Z = bR + cR² and R = XXᵀ; all but Q in `squares` is used up."""
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
            z.diagonal(dim1=-2, dim2=-1).add_(a)  # Z itself is not needed again: this is the first factor, aI + Z
            q = z
        else:
            product(q, z, q, 1.0, a, target := free.pop())
            free += [q, z]
            q = target
    return q
