"""The passes around the products: momentum and norm, normalisation, weights; each reads and writes its tensors once.

A batch of B matrices X is stored wide, (B, m, n) with m ≤ n, in float16, both sizes padded with zeros to multiples of
8, which changes nothing: zero rows and columns stay zero. A tall matrix is transposed as it is normalised, and back as
its result is used, so no pass is spent on that.

Tensors that lie apart come as a table of their addresses. Of the matrices of a Teon step, number b is the e-th of each
of the K tensors of stack u, b = u·E + e; its K layers lie side by side in the direction U, (B, m, K·n).

A norm is taken in two steps, for the same bits each time and without overflow: every tile leaves its largest |u| and
Σ (u / largest)²; then a program a matrix makes of them the two numbers by which the matrix is divided.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from yaongi.kernels import backend
from yaongi.kernels.newton_schulz.iteration import STORAGE, Product, bytes_per_matrix, iterate, torch_product
from yaongi.kernels.newton_schulz.reference import DIRECTION, triples

Tensor = torch.Tensor
WORKSPACE = 1_500_000_000  # bytes at most, but for a single matrix that needs more
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Config:
    """ROWS × COLUMNS elements a program; fewer columns and more rows where the matrix is narrow."""

    rows: int
    columns: int
    num_warps: int


# `across` where a pass transposes, `along` elsewhere.
CONFIGS = {"along": Config(rows=8, columns=512, num_warps=4), "across": Config(rows=64, columns=64, num_warps=4)}
REDUCTION = 1024  # partial norms a program reads at a time


@dataclass(frozen=True)
class ProductConfig:
    """A tile of the last product, and how it is run."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


# What the last product writes: a result, or weights, whose tile lies in registers beside the product's.
LAST_PRODUCT = {
    "result": ProductConfig(rows=128, columns=128, inner=64, num_warps=8, num_stages=3),
    "weights": ProductConfig(rows=128, columns=64, inner=64, num_warps=4, num_stages=3),
}
FUSED_UP_TO = 1024  # short edge up to which the last product writes what its result is for; beyond, it is cuBLAS's


@dataclass(frozen=True)
class Tiling:
    """How a matrix is cut into tiles."""

    rows: int
    columns: int
    count: int
    num_warps: int


def _tiling(m: int, n: int, *, across: bool) -> Tiling:
    config = CONFIGS["across" if across else "along"]
    columns = min(config.columns, triton.next_power_of_2(n))
    rows = min(config.rows * config.columns // columns, triton.next_power_of_2(m))
    return Tiling(rows, columns, triton.cdiv(m, rows) * triton.cdiv(n, columns), config.num_warps)


def _padded(size: int) -> int:
    """Rows start on 16 bytes then."""
    return triton.cdiv(size, 8) * 8


@triton.jit
def _address(table_ptr, i, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The i-th pointer of a table."""
    pointer = tl.load(table_ptr + i).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _tile(tile, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows and columns of a tile of a matrix with n columns."""
    across = tl.cdiv(n, COLUMNS)
    row = tile // across * ROWS + tl.arange(0, ROWS)[:, None]
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column


@triton.jit
def _store_partial_norm(value, partial_ptr):
    """The largest |value| and Σ (value / largest)², (2,); a NaN or an infinity makes the sum NaN."""
    largest = tl.max(tl.max(tl.abs(value), 1), 0)
    scaled = value / tl.where(largest > 0, largest, 1.0)
    tl.store(partial_ptr, largest)
    tl.store(partial_ptr + 1, tl.sum(tl.sum(scaled * scaled, 1), 0))


@triton.jit
def _teon_momentum_kernel(
    grad_table,  # (K · U) addresses of (E, m, n)
    momentum_table,
    direction_ptr,  # (B, m, K · n)
    partial_ptr,  # (B, K · tiles, 2)
    first,  # number of this batch's first matrix
    E,
    m,
    n,
    momentum,
    tiles,
    GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ALIGNED: tl.constexpr,
    NESTEROV: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, layer = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    local, k = layer // K, layer % K
    matrix = first + local
    i, e = matrix // E * K + k, (matrix % E).to(tl.int64)
    row, column = _tile(tile, n, ROWS, COLUMNS)
    inside = (row < m) & (column < n)
    place = row * n + column
    grad_ptr = _address(grad_table, i, GRAD, ALIGNED) + e * m * n
    momentum_ptr = _address(momentum_table, i, MOMENTUM, ALIGNED) + e * m * n
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    accumulated = momentum * tl.load(momentum_ptr + place, mask=inside, other=0.0).to(tl.float32) + grad
    tl.store(momentum_ptr + place, accumulated.to(MOMENTUM), mask=inside)
    if NESTEROV:
        accumulated = grad + momentum * accumulated
    direction = accumulated.to(direction_ptr.dtype.element_ty)
    direction_ptr += local.to(tl.int64) * m * n * K + k * n
    tl.store(direction_ptr + row * (n * K) + column, direction, mask=inside)
    _store_partial_norm(direction.to(tl.float32), partial_ptr + 2 * tl.program_id(0).to(tl.int64))


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
    row, column = _tile(tile, n, ROWS, COLUMNS)
    x = tl.load(x_ptr + matrix * m * n + row * n + column, mask=(row < m) & (column < n), other=0.0)
    _store_partial_norm(x.to(tl.float32), partial_ptr + 2 * tl.program_id(0).to(tl.int64))


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
    tl.store(divisor_ptr + 2 * matrix + 1, tl.where(norm < 1, 1.0, norm))  # a NaN stays one


@triton.jit
def _newton_schulz_normalise_kernel(
    x_ptr,  # (B, m, n), contiguous
    divisor_ptr,  # (B, 2)
    wide_ptr,  # (B, rows, columns), padded, float16; of the transposed matrix with TRANSPOSED
    m,
    n,
    rows,
    columns,
    tiles,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Tiles cover the padded matrix, so that the padding is written too."""
    tile, matrix = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    if TRANSPOSED:
        row, column = _tile(tile, rows, ROWS, COLUMNS)
    else:
        row, column = _tile(tile, columns, ROWS, COLUMNS)
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
def _load_result(wide_ptr, row, column, inside, columns, TRANSPOSED: tl.constexpr):
    """A tile of a wide result, in the layout of the matrix it belongs to; row (ROWS, 1), column (1, COLUMNS)."""
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
    row, column = _tile(tile, n, ROWS, COLUMNS)
    inside = (row < m) & (column < n)
    result = _load_result(wide_ptr + matrix * rows * columns, row, column, inside, columns, TRANSPOSED)
    tl.store(out_ptr + matrix * m * n + row * n + column, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _update(
    weight_table,
    param_table,
    matrix,
    k,
    row,
    column,
    E,
    m,
    n,
    decay,
    change,
    WEIGHT: tl.constexpr,
    PARAM: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    K: tl.constexpr,
):
    """W ← decay·W − change on a tile of the k-th layer of a stack, and the parameter's cast."""
    i, e = matrix // E * K + k, (matrix % E).to(tl.int64)
    inside, place = (row < m) & (column < n), row * n + column
    weight_ptr = _address(weight_table, i, WEIGHT, ALIGNED) + e * m * n
    weight = decay * tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32) - change
    tl.store(weight_ptr + place, weight.to(WEIGHT), mask=inside)
    if HAS_MASTERS:
        param_ptr = _address(param_table, i, PARAM, ALIGNED) + e * m * n
        tl.store(param_ptr + place, weight.to(PARAM), mask=inside)


@triton.jit
def _teon_weight_kernel(
    wide_ptr,  # (B, rows, columns): the orthogonalised directions
    weight_table,  # (K · U) addresses of (E, m, n): what takes the update
    param_table,  # the same, of the casts
    first,
    E,
    m,
    n,
    rows,
    columns,
    decay,  # 1 − η·λ
    scale,  # η·sqrt(m/n)
    tiles,
    WEIGHT: tl.constexpr,
    PARAM: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, layer = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    local, k = layer // K, layer % K
    row, column = _tile(tile, n, ROWS, COLUMNS)
    inside = (row < m) & (column < n)
    wide_ptr += local.to(tl.int64) * rows * columns
    change = scale * _load_result(wide_ptr, row, k * n + column, inside, columns, TRANSPOSED)
    _update(
        weight_table, param_table, first + local, k, row, column, E, m, n, decay, change,
        WEIGHT, PARAM, ALIGNED, HAS_MASTERS, K,
    )  # fmt: skip


@triton.jit
def _result_tile(
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
    """The tile of Q·X, or of (Q·X)ᵀ = Xᵀ·Q, that starts at (row, column)."""
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
    """Q·X in the result's own layout and dtype."""
    tile, matrix = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    across = tl.cdiv(n, COLUMNS)
    first_row, first_column = tile // across * ROWS, tile % across * COLUMNS
    result = _result_tile(q_desc, x_desc, matrix, first_row, first_column, inner, TRANSPOSED, ROWS, COLUMNS, INNER)
    row, column = _tile(tile, n, ROWS, COLUMNS)
    out_ptr += matrix.to(tl.int64) * m * n
    tl.store(out_ptr + row * n + column, result.to(out_ptr.dtype.element_ty), mask=(row < m) & (column < n))


@triton.jit
def _teon_last_product_kernel(
    q_desc,
    x_desc,
    weight_table,  # (K · U) addresses of (E, m, n): what takes the update
    param_table,  # the same, of the casts
    first,
    E,
    m,
    n,
    inner,
    decay,  # 1 − η·λ
    scale,  # η·sqrt(m/n)
    tiles,
    WEIGHT: tl.constexpr,
    PARAM: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """W ← decay·W − scale·Q·X, without Q·X ever being stored."""
    tile, layer = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    local, k = layer // K, layer % K
    across = tl.cdiv(n, COLUMNS)
    first_row, first_column = tile // across * ROWS, k * n + tile % across * COLUMNS
    result = _result_tile(q_desc, x_desc, local, first_row, first_column, inner, TRANSPOSED, ROWS, COLUMNS, INNER)
    row, column = _tile(tile, n, ROWS, COLUMNS)
    _update(
        weight_table, param_table, first + local, k, row, column, E, m, n, decay, scale * result,
        WEIGHT, PARAM, ALIGNED, HAS_MASTERS, K,
    )  # fmt: skip


@dataclass(frozen=True)
class Wide:
    """The stored form of matrices m × n: of the transposed one if m > n, and padded."""

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
        """Batches of equal size, but for the last one, as large as the workspace allows."""
        most = max(1, WORKSPACE // bytes_per_matrix(self.rows, self.columns))
        size = triton.cdiv(count, triton.cdiv(count, most))
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]

    def empty(self, count: int, like: Tensor) -> Tensor:
        return torch.empty(count, self.rows, self.columns, dtype=STORAGE, device=like.device)

    def normalise(self, x: Tensor, partial: Tensor, wide: Tensor) -> None:
        """X/‖X‖_F from x, (B, m, n) in any dtype, and the partial norms of its tiles, (B, P, 2)."""
        count = x.shape[0]
        divisors = torch.empty(count, 2, dtype=torch.float32, device=x.device)
        _newton_schulz_divisors_kernel[(count,)](
            partial, divisors, partial.shape[1], BLOCK=min(REDUCTION, triton.next_power_of_2(partial.shape[1]))
        )
        padded = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        tiling = _tiling(*padded, across=self.transposed)
        _newton_schulz_normalise_kernel[(count * tiling.count,)](
            x, divisors, wide, self.m, self.n, self.rows, self.columns, tiling.count, TRANSPOSED=self.transposed,
            ROWS=tiling.rows, COLUMNS=tiling.columns, num_warps=tiling.num_warps,
        )  # fmt: skip

    @property
    def fused(self) -> bool:
        """Whether the last product writes what its result is for."""
        return self.rows <= FUSED_UP_TO

    def factors(self, q: Tensor, x: Tensor, config: ProductConfig) -> tuple[TensorDescriptor, TensorDescriptor]:
        """Q and X as the copy engine reads them for a tile of the last product."""
        if self.transposed:
            boxes = [1, config.inner, config.columns], [1, config.inner, config.rows]
        else:
            boxes = [1, config.rows, config.inner], [1, config.inner, config.columns]
        return TensorDescriptor.from_tensor(q, boxes[0]), TensorDescriptor.from_tensor(x, boxes[1])

    def last_product(self, q: Tensor, x: Tensor, out: Tensor) -> None:
        """out = Q·X, (B, m, n) in any dtype."""
        config = LAST_PRODUCT["result"]
        tiles = triton.cdiv(self.m, config.rows) * triton.cdiv(self.n, config.columns)
        _newton_schulz_last_product_kernel[(out.shape[0] * tiles,)](
            *self.factors(q, x, config), out, self.m, self.n, self.rows, tiles, TRANSPOSED=self.transposed,
            ROWS=config.rows, COLUMNS=config.columns, INNER=config.inner,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    def result(self, wide: Tensor, out: Tensor) -> None:
        """Writes what lies in `wide` to out, (B, m, n) in any dtype."""
        tiling = _tiling(self.m, self.n, across=self.transposed)
        _newton_schulz_result_kernel[(out.shape[0] * tiling.count,)](
            wide, out, self.m, self.n, self.rows, self.columns, tiling.count, TRANSPOSED=self.transposed,
            ROWS=tiling.rows, COLUMNS=tiling.columns, num_warps=tiling.num_warps,
        )  # fmt: skip


def _partial_norms(x: Tensor) -> Tensor:
    """(B, tiles, 2) of contiguous matrices (B, m, n)."""
    count, m, n = x.shape
    tiling = _tiling(m, n, across=False)
    partial = torch.empty(count, tiling.count, 2, dtype=torch.float32, device=x.device)
    _newton_schulz_norm_kernel[(count * tiling.count,)](
        x, partial, m, n, tiling.count, ROWS=tiling.rows, COLUMNS=tiling.columns, num_warps=tiling.num_warps
    )
    return partial


def newton_schulz_triton(x: Tensor, coefficients: list[float], form: str) -> Tensor:
    """As `newton_schulz_reference` with float16 as its storage; products by torch."""
    return _newton_schulz(torch_product, x, coefficients, form)


def newton_schulz_cuda(x: Tensor, coefficients: list[float], form: str) -> Tensor:
    """The same with symmetric products by the CUDA kernel, past the checks of its op."""
    return _newton_schulz(backend.cuda_launcher("symmetric_product"), x, coefficients, form)


def _newton_schulz(product: Product, x: Tensor, coefficients: list[float], form: str) -> Tensor:
    """Newton-Schulz with one way to take symmetric products."""
    if not x.numel():
        return x.new_empty(x.shape)
    m, n = x.shape[-2:]
    out = x.new_empty(x.shape)
    flat, results, layout = x.contiguous().view(-1, m, n), out.view(-1, m, n), Wide(m, n)
    batches = layout.batches(flat.shape[0])
    memory = [layout.empty(batches[0].stop, x) for _ in range(2)]
    for batch in batches:
        source, result = flat[batch], results[batch]
        wide, spare = (half[: len(source)] for half in memory)
        layout.normalise(source, _partial_norms(source), wide)
        q, wide, spare = iterate(wide, spare, triples(coefficients), form, product)
        if layout.fused:
            layout.last_product(q, wide, result)
        elif result.dtype == STORAGE and result.shape == wide.shape:
            torch.bmm(q, wide, out=result)
        else:
            layout.result(torch.bmm(q, wide, out=spare), result)
    return out


class Addresses:
    """Tables of the addresses of tensors, on the GPU.

    Training meets the same tensors each step, and then pays nothing; a new table is copied from pinned memory, without
    waiting, and belongs to the stream that copied it. In a graph that is being captured the copy is the graph's own and
    happens at every replay: such a table is for that graph alone, and its source is kept for good.
    """

    KEPT = 256

    def __init__(self) -> None:
        self._known = functools.lru_cache(maxsize=self.KEPT)(self._copied)
        self._captured: list[Tensor] = []

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        """(len(tensors)) int64."""
        device, pointers = tensors[0].device, tuple(t.data_ptr() for t in tensors)
        if device.type != "cuda":
            return self._known(pointers, device, 0)[0]
        if torch.cuda.is_current_stream_capturing():
            table, source = self._copied(pointers, device, 0)
            self._captured.append(source)
            return table
        return self._known(pointers, device, torch.cuda.current_stream(device).cuda_stream)[0]

    @staticmethod
    def _copied(pointers: tuple[int, ...], device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
        """The table and its source in host memory."""
        source = torch.tensor(pointers, dtype=torch.int64, pin_memory=device.type == "cuda")
        return source.to(device, non_blocking=True), source


addresses = Addresses()


class Apart:
    """Tensors of one shape and dtype that lie apart, as a kernel takes them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors  # which may be copies that nobody else holds
        self.table = addresses(tensors)
        self.type = TYPES[tensors[0].dtype]
        self.aligned = all(t.data_ptr() % 16 == 0 for t in tensors)


class Teon:
    """One call of `teon_update`: its tensors, and the passes over a batch of their matrices."""

    def __init__(
        self, params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], masters: list[Tensor], stack: int
    ) -> None:
        self.E, self.m, self.n = (1, *params[0].shape)[-3:]
        self.stack = stack
        self.layout = Wide(self.m, stack * self.n)
        self.count = len(params) // stack * self.E  # matrices to orthogonalise
        self._has_masters = bool(masters)
        self._grads, self._momenta = Apart([g.contiguous() for g in grads]), Apart(momenta)
        self._weights, self._params = Apart(masters or params), Apart(params)
        self._fused = self.layout.fused and (stack == 1 or self.n % 8 == 0)  # the copy engine's boxes start on 16 bytes

    def directions(self, first: int, u: Tensor, momentum: float, nesterov: bool) -> Tensor:
        """Moves the momenta of the matrices first … and writes U, (B, m, K·n); returns its partial norms."""
        K, count = self.stack, u.shape[0]
        tiling = _tiling(self.m, self.n, across=False)
        partial = torch.empty(count, K * tiling.count, 2, dtype=torch.float32, device=u.device)
        _teon_momentum_kernel[(count * K * tiling.count,)](
            self._grads.table, self._momenta.table, u, partial, first, self.E, self.m, self.n, momentum, tiling.count,
            GRAD=self._grads.type, MOMENTUM=self._momenta.type, ALIGNED=self._grads.aligned and self._momenta.aligned,
            NESTEROV=nesterov, K=K, ROWS=tiling.rows, COLUMNS=tiling.columns, num_warps=tiling.num_warps,
        )  # fmt: skip
        return partial

    def apply(self, first: int, q: Tensor, x: Tensor, spare: Tensor, decay: float, scale: float) -> None:
        """W ← decay·W − scale·Q·X for the matrices first …, and the parameters' casts."""
        weights, params, layout = self._weights, self._params, self.layout
        tables = weights.table, params.table
        types = {
            "WEIGHT": weights.type, "PARAM": params.type, "ALIGNED": weights.aligned and params.aligned,
            "HAS_MASTERS": self._has_masters, "TRANSPOSED": layout.transposed, "K": self.stack,
        }  # fmt: skip
        if self._fused:
            config = LAST_PRODUCT["weights"]
            tiles = triton.cdiv(self.m, config.rows) * triton.cdiv(self.n, config.columns)
            _teon_last_product_kernel[(x.shape[0] * self.stack * tiles,)](
                *layout.factors(q, x, config), *tables, first, self.E, self.m, self.n, layout.rows, decay, scale, tiles,
                **types, ROWS=config.rows, COLUMNS=config.columns, INNER=config.inner,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
            return
        tiling = _tiling(self.m, self.n, across=layout.transposed)
        _teon_weight_kernel[(x.shape[0] * self.stack * tiling.count,)](
            torch.bmm(q, x, out=spare), *tables, first, self.E, self.m, self.n, layout.rows, layout.columns,
            decay, scale, tiling.count, **types,
            ROWS=tiling.rows, COLUMNS=tiling.columns, num_warps=tiling.num_warps,
        )  # fmt: skip


def teon_update_triton(*args: Any) -> None:
    """As `teon_update_reference` with float16 as its storage; products by torch."""
    _teon_update(torch_product, *args)


def teon_update_cuda(*args: Any) -> None:
    """The same with symmetric products by the CUDA kernel."""
    _teon_update(backend.cuda_launcher("symmetric_product"), *args)


def _teon_update(
    product: Product,
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    masters: list[Tensor],
    stack: int,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    coefficients: list[float],
) -> None:
    """The update with one way to take symmetric products, in batches that fit the workspace."""
    if not params[0].numel():
        return
    step = Teon(params, grads, momenta, masters, stack)
    m, n, layout, steps = step.m, step.n, step.layout, triples(coefficients)
    batches = layout.batches(step.count)
    memory = [layout.empty(batches[0].stop, params[0]) for _ in range(2)]
    for batch in batches:
        count = batch.stop - batch.start
        wide, spare = (half[:count] for half in memory)
        u = spare.view(-1)[: count * m * stack * n].view(DIRECTION).view(count, m, stack * n)
        layout.normalise(u, step.directions(batch.start, u, momentum, nesterov), wide)
        q, wide, spare = iterate(wide, spare, steps, "gram", product)
        step.apply(batch.start, q, wide, spare, 1 - lr * weight_decay, lr * math.sqrt(m / n))
    torch.autograd.graph.increment_version([*params, *momenta, *masters])
