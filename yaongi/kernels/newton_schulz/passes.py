"""The passes around the products: norm, normalisation, last product; each reads and writes its tensors once.

A batch of B matrices X is stored wide, (B, m, n) with m ≤ n, in float16. Both sizes are padded with zeros to multiples
of 8; zero rows and columns stay zero, so this doesn't change the result. A tall matrix is transposed in the pass that
normalises it, and back in the pass that uses its result, so transposing needs no pass of its own.

A norm takes two steps, which makes it reproducible and free of overflow: each tile stores its largest |u| and
Σ (u / largest)²; then one program per matrix computes from them the two numbers by which the matrix is divided.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from yaongi.kernels import backend
from yaongi.kernels.common.descriptors import descriptor
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv, next_power_of_2
from yaongi.kernels.newton_schulz.iteration import STORAGE, Product, bytes_per_matrix, iterate, torch_product
from yaongi.kernels.newton_schulz.reference import triples

Tensor = torch.Tensor
WORKSPACE = 1_500_000_000  # most bytes, unless a single matrix needs more


@dataclass(frozen=True)
class Config:
    """ROWS × COLUMNS elements per program; fewer columns and more rows where the matrix is narrow."""

    rows: int
    columns: int
    num_warps: int


# `across` where a pass transposes, `along` elsewhere.
CONFIGS = {"along": Config(rows=8, columns=512, num_warps=4), "across": Config(rows=64, columns=64, num_warps=4)}
REDUCTION = 1024  # partial norms that a program reads at a time


@dataclass(frozen=True)
class ProductConfig:
    """Tile and launch options of the last product."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


# By what the last product writes: a result, or weights, whose tile takes registers next to the accumulator.
LAST_PRODUCT = {
    "result": ProductConfig(rows=128, columns=128, inner=64, num_warps=8, num_stages=3),
    "weights": ProductConfig(rows=128, columns=64, inner=64, num_warps=4, num_stages=3),
}
# Largest short edge for which a Triton kernel fuses the last product with its use; above it cuBLAS is faster.
FUSED_UP_TO = 1024


@dataclass(frozen=True)
class Tiling:
    """Tiles of a matrix: their size and number."""

    rows: int
    columns: int
    count: int
    num_warps: int


@cache  # asked for at each launch, and small matrices wait for the host
def tiling_of(m: int, n: int, *, across: bool) -> Tiling:
    config = CONFIGS["across" if across else "along"]
    columns = min(config.columns, next_power_of_2(n))
    rows = min(config.rows * config.columns // columns, next_power_of_2(m))
    return Tiling(rows, columns, cdiv(m, rows) * cdiv(n, columns), config.num_warps)


def _padded(size: int) -> int:
    """Round up to a multiple of 8, so that float16 rows start at multiples of 16 bytes."""
    return -(-size // 8) * 8


@triton.jit
def tile_places(tile, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the rows (ROWS, 1) and columns (1, COLUMNS) of a tile of a matrix with n columns."""
    across = tl.cdiv(n, COLUMNS)
    row = tile // across * ROWS + tl.arange(0, ROWS)[:, None]
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column


@triton.jit
def store_partial_norm(value, partial_ptr):
    """Store the largest |value| and Σ (value / largest)²; a NaN or an infinity makes the sum NaN."""
    largest = tl.max(tl.max(tl.abs(value), 1), 0)
    scaled = value / tl.where(largest > 0, largest, 1.0)
    tl.store(partial_ptr, largest)
    tl.store(partial_ptr + 1, tl.sum(tl.sum(scaled * scaled, 1), 0))


@triton.jit
def _newton_schulz_norm_kernel(
    x_ptr,  # (B, m, n), contiguous
    partial_ptr,  # (B, tiles, 2)
    m,
    n,
    tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, matrix = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    row, column = tile_places(tile, n, ROWS, COLUMNS)
    x = tl.load(x_ptr + matrix * m * n + row * n + column, mask=(row < m) & (column < n), other=0.0)
    store_partial_norm(x.to(tl.float32), partial_ptr + 2 * tl.program_id(0).to(tl.int64))


@triton.jit
def _newton_schulz_divisors_kernel(
    partial_ptr,  # (B, P, 2)
    divisor_ptr,  # (B, 2): largest |x|, and ‖x / largest‖; 1 and 1 for a zero matrix
    P,
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(0).to(tl.int64)
    partial_ptr += matrix * P * 2
    i = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, P, BLOCK):
        largest = tl.maximum(largest, tl.load(partial_ptr + 2 * (start + i), mask=start + i < P, other=0.0))
    whole = tl.max(largest, 0)
    whole = tl.where(whole > 0, whole, 1.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, P, BLOCK):
        ratio = tl.load(partial_ptr + 2 * (start + i), mask=start + i < P, other=0.0) / whole
        total += tl.load(partial_ptr + 2 * (start + i) + 1, mask=start + i < P, other=0.0) * ratio * ratio
    norm = tl.sqrt(tl.sum(total, 0))
    tl.store(divisor_ptr + 2 * matrix, whole)
    tl.store(divisor_ptr + 2 * matrix + 1, tl.where(norm < 1, 1.0, norm))  # a NaN stays NaN


@triton.jit
def _newton_schulz_normalise_kernel(
    x_ptr,  # (B, m, n), contiguous
    divisor_ptr,  # (B, 2)
    wide_ptr,  # (B, rows, columns), padded, float16; the transposed matrix if TRANSPOSED
    m,
    n,
    rows,
    columns,
    tiles,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Divide by the norm and store in float16; the tiles cover the padded matrix, so the padding is written too."""
    tile, matrix = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    if TRANSPOSED:
        row, column = tile_places(tile, rows, ROWS, COLUMNS)
    else:
        row, column = tile_places(tile, columns, ROWS, COLUMNS)
    x = tl.load(x_ptr + matrix * m * n + row * n + column, mask=(row < m) & (column < n), other=0.0)
    x = x.to(tl.float32) / tl.load(divisor_ptr + 2 * matrix) / tl.load(divisor_ptr + 2 * matrix + 1)
    x = x.to(wide_ptr.dtype.element_ty)
    wide_ptr += matrix * rows * columns
    if TRANSPOSED:
        row, column = tl.trans(row), tl.trans(column)
        tl.store(wide_ptr + column * columns + row, tl.trans(x), mask=(column < rows) & (row < columns))
    else:
        tl.store(wide_ptr + row * columns + column, x, mask=(row < rows) & (column < columns))


@triton.jit
def load_result(wide_ptr, row, column, inside, columns, TRANSPOSED: tl.constexpr):
    """Load a tile of a wide result in the original matrix's orientation; row (ROWS, 1), column (1, COLUMNS)."""
    if TRANSPOSED:
        place = tl.trans(column) * columns + tl.trans(row)
        return tl.trans(tl.load(wide_ptr + place, mask=tl.trans(inside), other=0.0)).to(tl.float32)
    return tl.load(wide_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _newton_schulz_result_kernel(
    wide_ptr,  # (B, rows, columns)
    out_ptr,  # (B, m, n), contiguous
    m,
    n,
    rows,
    columns,
    tiles,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, matrix = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    row, column = tile_places(tile, n, ROWS, COLUMNS)
    inside = (row < m) & (column < n)
    result = load_result(wide_ptr + matrix * rows * columns, row, column, inside, columns, TRANSPOSED)
    tl.store(out_ptr + matrix * m * n + row * n + column, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def result_tile(
    q_desc,  # (B, rows, rows)
    x_desc,  # (B, rows, columns)
    matrix,
    row,
    column,
    inner,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Compute the tile of Q·X, or of (Q·X)ᵀ = Xᵀ·Q, that starts at (row, column)."""
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, inner, INNER):
        if TRANSPOSED:
            x = x_desc.load([matrix, k, row]).reshape(INNER, ROWS)
            q = q_desc.load([matrix, k, column]).reshape(INNER, COLUMNS)
            result = tl.dot(x.T, q, result)
        else:
            q = q_desc.load([matrix, row, k]).reshape(ROWS, INNER)
            x = x_desc.load([matrix, k, column]).reshape(INNER, COLUMNS)
            result = tl.dot(q, x, result)
    return result


@triton.jit
def _newton_schulz_last_product_kernel(
    q_desc,
    x_desc,
    out_ptr,  # (B, m, n), contiguous
    m,
    n,
    inner,
    tiles,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Compute Q·X in the result's own orientation and dtype."""
    tile, matrix = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    across = tl.cdiv(n, COLUMNS)
    first_row, first_column = tile // across * ROWS, tile % across * COLUMNS
    result = result_tile(q_desc, x_desc, matrix, first_row, first_column, inner, TRANSPOSED, ROWS, COLUMNS, INNER)
    row, column = tile_places(tile, n, ROWS, COLUMNS)
    out_ptr += matrix.to(tl.int64) * m * n
    tl.store(out_ptr + row * n + column, result.to(out_ptr.dtype.element_ty), mask=(row < m) & (column < n))


@dataclass(frozen=True)
class WideLayout:
    """Storage layout of m × n matrices: transposed if m > n, and padded."""

    m: int
    n: int

    @property
    def transposed(self) -> bool:
        return self.m > self.n

    @property
    def rows(self) -> int:
        return _padded(min(self.m, self.n))

    @property
    def columns(self) -> int:
        return _padded(max(self.m, self.n))

    def batches(self, count: int) -> list[slice]:
        """Return batches as large as the workspace allows, equal in size except for the last."""
        most = max(1, WORKSPACE // bytes_per_matrix(self.rows, self.columns))
        size = cdiv(count, cdiv(count, most))
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]

    def empty(self, count: int, like: Tensor) -> Tensor:
        return torch.empty(count, self.rows, self.columns, dtype=STORAGE, device=like.device)

    def normalise(self, x: Tensor, partial: Tensor, wide: Tensor) -> None:
        """Write X/‖X‖_F to `wide` from x, (B, m, n) in any dtype, and the partial norms of its tiles, (B, P, 2)."""
        count = x.shape[0]
        divisors = torch.empty(count, 2, dtype=torch.float32, device=x.device)
        launcher(_newton_schulz_divisors_kernel, (count,))(
            partial, divisors, partial.shape[1], BLOCK=min(REDUCTION, next_power_of_2(partial.shape[1]))
        )
        padded = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        tiling = tiling_of(*padded, across=self.transposed)
        launcher(_newton_schulz_normalise_kernel, (count * tiling.count,))(
            x, divisors, wide, self.m, self.n, self.rows, self.columns, tiling.count, TRANSPOSED=self.transposed,
            ROWS=tiling.rows, COLUMNS=tiling.columns, num_warps=tiling.num_warps,
        )  # fmt: skip

    @property
    def fused(self) -> bool:
        """Whether the last product and the use of its result run as one kernel."""
        return self.rows <= FUSED_UP_TO

    def factors(self, q: Tensor, x: Tensor, config: ProductConfig) -> tuple[TensorDescriptor, TensorDescriptor]:
        """Return TMA descriptors of Q and X for a tile of the last product."""
        if self.transposed:
            boxes = (config.inner, config.columns), (config.inner, config.rows)
        else:
            boxes = (config.rows, config.inner), (config.inner, config.columns)
        return descriptor(q, *boxes[0]), descriptor(x, *boxes[1])

    def last_product(self, q: Tensor, x: Tensor, out: Tensor) -> None:
        """Compute out = Q·X, (B, m, n) in any dtype."""
        config = LAST_PRODUCT["result"]
        tiles = cdiv(self.m, config.rows) * cdiv(self.n, config.columns)
        launcher(_newton_schulz_last_product_kernel, (out.shape[0] * tiles,))(
            *self.factors(q, x, config), out, self.m, self.n, self.rows, tiles, TRANSPOSED=self.transposed,
            ROWS=config.rows, COLUMNS=config.columns, INNER=config.inner,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    def result(self, wide: Tensor, out: Tensor) -> None:
        """Copy the results in `wide` to out, (B, m, n) in any dtype."""
        tiling = tiling_of(self.m, self.n, across=self.transposed)
        launcher(_newton_schulz_result_kernel, (out.shape[0] * tiling.count,))(
            wide, out, self.m, self.n, self.rows, self.columns, tiling.count, TRANSPOSED=self.transposed,
            ROWS=tiling.rows, COLUMNS=tiling.columns, num_warps=tiling.num_warps,
        )  # fmt: skip


def _partial_norms(x: Tensor) -> Tensor:
    """Return the partial norms, (B, tiles, 2), of contiguous matrices (B, m, n)."""
    count, m, n = x.shape
    tiling = tiling_of(m, n, across=False)
    partial = torch.empty(count, tiling.count, 2, dtype=torch.float32, device=x.device)
    launcher(_newton_schulz_norm_kernel, (count * tiling.count,))(
        x, partial, m, n, tiling.count, ROWS=tiling.rows, COLUMNS=tiling.columns, num_warps=tiling.num_warps
    )
    return partial


def newton_schulz_triton(x: Tensor, coefficients: list[float], form: str) -> Tensor:
    """Compute what `newton_schulz_reference` does with float16 storage; torch computes the products."""
    return _newton_schulz(torch_product, x, coefficients, form)


def newton_schulz_cuda(x: Tensor, coefficients: list[float], form: str) -> Tensor:
    """Compute the same with the CUDA kernel's symmetric products, skipping the checks of its op."""
    return _newton_schulz(backend.cuda_launcher("symmetric_product"), x, coefficients, form)


def _newton_schulz(product: Product, x: Tensor, coefficients: list[float], form: str) -> Tensor:
    """Run Newton-Schulz, with `product` for the symmetric products."""
    if not x.numel():
        return x.new_empty(x.shape)
    m, n = x.shape[-2:]
    out = x.new_empty(x.shape)
    flat, results, layout = x.contiguous().view(-1, m, n), out.view(-1, m, n), WideLayout(m, n)
    batches = layout.batches(flat.shape[0])
    memory = [layout.empty(batches[0].stop, x) for _ in range(2)]
    for batch in batches:
        source, result = flat[batch], results[batch]
        wide, scratch = (half[: len(source)] for half in memory)
        layout.normalise(source, _partial_norms(source), wide)
        q, wide, scratch = iterate(wide, scratch, triples(coefficients), form, product)
        if layout.fused:
            layout.last_product(q, wide, result)
        elif result.dtype == STORAGE and result.shape == wide.shape:
            torch.bmm(q, wide, out=result)
        else:
            layout.result(torch.bmm(q, wide, out=scratch), result)
    return out
