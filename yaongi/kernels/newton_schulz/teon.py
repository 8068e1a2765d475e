"""The Teon update on a GPU: a pass over gradients and momenta before the Newton-Schulz steps, and over weights after.

The kernels read separately allocated tensors through a table of their addresses. Joint matrix number b = u·E + e of a
step consists of the e-th matrix of each of the K tensors of stack u; these K lie side by side in U, (B, m, K·n).
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from yaongi.kernels import backend
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv
from yaongi.kernels.newton_schulz.iteration import Product, iterate, torch_product
from yaongi.kernels.newton_schulz.passes import (
    LAST_PRODUCT,
    WideLayout,
    load_result,
    result_tile,
    store_partial_norm,
    tile_places,
    tiling_of,
)
from yaongi.kernels.newton_schulz.reference import DIRECTION, triples

Tensor = torch.Tensor
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _address(table_ptr, i, TYPE: tl.constexpr):
    """Load the i-th pointer of a table."""
    return tl.multiple_of(tl.load(table_ptr + i).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _kept(inside, active_ptr, matrix):
    """Return which elements to change: none where the matrix is not active."""
    if active_ptr is not None:
        inside = inside & (tl.load(active_ptr + matrix) != 0)
    return inside


@triton.jit
def _teon_momentum_kernel(
    grad_table,  # (stacks · K) addresses of tensors (E, m, n)
    momentum_table,
    active_ptr,  # (stacks · E) uint8: 0 for a matrix to leave alone; None: none is
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
    NESTEROV: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, layer = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    local, k = layer // K, layer % K
    matrix = first + local
    i, e = matrix // E * K + k, (matrix % E).to(tl.int64)
    row, column = tile_places(tile, n, ROWS, COLUMNS)
    inside = (row < m) & (column < n)
    kept = _kept(inside, active_ptr, matrix)
    place = row * n + column
    grad_ptr = _address(grad_table, i, GRAD) + e * m * n
    momentum_ptr = _address(momentum_table, i, MOMENTUM) + e * m * n
    grad = tl.load(grad_ptr + place, mask=kept, other=0.0).to(tl.float32)
    accumulated = momentum * tl.load(momentum_ptr + place, mask=kept, other=0.0).to(tl.float32) + grad
    tl.store(momentum_ptr + place, accumulated.to(MOMENTUM), mask=kept)
    if NESTEROV:
        accumulated = grad + momentum * accumulated
    direction = accumulated.to(direction_ptr.dtype.element_ty)
    direction_ptr += local.to(tl.int64) * m * n * K + k * n
    tl.store(direction_ptr + row * (n * K) + column, direction, mask=inside)
    store_partial_norm(direction.to(tl.float32), partial_ptr + 2 * tl.program_id(0).to(tl.int64))


@triton.jit
def _update(
    weight_table,
    param_table,
    active_ptr,
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
    HAS_MASTERS: tl.constexpr,
    K: tl.constexpr,
):
    """Compute W ← decay·W − change on a tile of the k-th layer of an active stack, and the parameter's cast."""
    i, e = matrix // E * K + k, (matrix % E).to(tl.int64)
    inside, place = _kept((row < m) & (column < n), active_ptr, matrix), row * n + column
    weight_ptr = _address(weight_table, i, WEIGHT) + e * m * n
    weight = decay * tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32) - change
    tl.store(weight_ptr + place, weight.to(WEIGHT), mask=inside)
    if HAS_MASTERS:
        param_ptr = _address(param_table, i, PARAM) + e * m * n
        tl.store(param_ptr + place, weight.to(PARAM), mask=inside)


@triton.jit
def _teon_weight_kernel(
    wide_ptr,  # (B, rows, columns): the orthogonalised directions
    weight_table,  # (stacks · K) addresses of tensors (E, m, n): the master weights, else the parameters
    param_table,  # the same, of the parameters
    active_ptr,  # (stacks · E) uint8: 0 for a matrix to leave alone; None: none is
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
    HAS_MASTERS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, layer = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    local, k = layer // K, layer % K
    row, column = tile_places(tile, n, ROWS, COLUMNS)
    inside = (row < m) & (column < n)
    wide_ptr += local.to(tl.int64) * rows * columns
    change = scale * load_result(wide_ptr, row, k * n + column, inside, columns, TRANSPOSED)
    _update(
        weight_table, param_table, active_ptr, first + local, k, row, column, E, m, n, decay, change,
        WEIGHT, PARAM, HAS_MASTERS, K,
    )  # fmt: skip


@triton.jit
def _teon_last_product_kernel(
    q_desc,
    x_desc,
    weight_table,  # (stacks · K) addresses of tensors (E, m, n): the master weights, else the parameters
    param_table,  # the same, of the parameters
    active_ptr,  # (stacks · E) uint8: 0 for a matrix to leave alone; None: none is
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
    HAS_MASTERS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Compute W ← decay·W − scale·Q·X without storing Q·X."""
    tile, layer = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    local, k = layer // K, layer % K
    across = tl.cdiv(n, COLUMNS)
    first_row, first_column = tile // across * ROWS, k * n + tile % across * COLUMNS
    result = result_tile(q_desc, x_desc, local, first_row, first_column, inner, TRANSPOSED, ROWS, COLUMNS, INNER)
    row, column = tile_places(tile, n, ROWS, COLUMNS)
    _update(
        weight_table, param_table, active_ptr, first + local, k, row, column, E, m, n, decay, scale * result,
        WEIGHT, PARAM, HAS_MASTERS, K,
    )  # fmt: skip


class PointerTables:
    """Tables of tensor addresses on the GPU, cached.

    Training passes the same tensors each step, which then costs no copy. A new table is copied from pinned memory
    without waiting; it is valid on the stream that copied it. During graph capture the copy becomes part of the graph
    and runs at every replay, so that table is used by this graph alone, and its host source is kept forever.
    """

    KEPT = 256

    def __init__(self) -> None:
        self._known = functools.lru_cache(maxsize=self.KEPT)(self._copied)
        self._captured: list[Tensor] = []

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        """Return the addresses, (len(tensors)) int64 on the tensors' device."""
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
        """Return the table and its source in host memory."""
        source = torch.tensor(pointers, dtype=torch.int64, pin_memory=device.type == "cuda")
        return source.to(device, non_blocking=True), source


pointer_tables = PointerTables()


class ScatteredTensors:
    """Separately allocated tensors of one shape and dtype, as a kernel takes them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors  # keeps contiguous copies alive until the kernel has run
        self.table = pointer_tables(tensors)
        self.type = TYPES[tensors[0].dtype]


class TeonCall:
    """One call of `teon_update`: its tensors, and the passes over a batch of their matrices."""

    def __init__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        momenta: list[Tensor],
        masters: list[Tensor],
        stack: int,
        active: Tensor | None,
    ) -> None:
        self.E, self.m, self.n = (1, *params[0].shape)[-3:]
        self.stack = stack
        self.layout = WideLayout(self.m, stack * self.n)
        self.count = len(params) // stack * self.E  # matrices to orthogonalise
        self._has_masters = bool(masters)
        self._active = None if active is None else active.contiguous().view(torch.uint8)
        self._grads, self._momenta = ScatteredTensors([g.contiguous() for g in grads]), ScatteredTensors(momenta)
        self._weights, self._params = ScatteredTensors(masters or params), ScatteredTensors(params)
        self._fused = self.layout.fused and (stack == 1 or self.n % 8 == 0)  # TMA boxes start at multiples of 16 bytes

    def directions(self, first: int, u: Tensor, momentum: float, nesterov: bool) -> Tensor:
        """Update the momenta of the B matrices from `first` on and write U, (B, m, K·n); return its partial norms."""
        K, count = self.stack, u.shape[0]
        tiling = tiling_of(self.m, self.n, across=False)
        partial = torch.empty(count, K * tiling.count, 2, dtype=torch.float32, device=u.device)
        launcher(_teon_momentum_kernel, (count * K * tiling.count,))(
            self._grads.table, self._momenta.table, self._active, u, partial, first, self.E, self.m, self.n, momentum,
            tiling.count, GRAD=self._grads.type, MOMENTUM=self._momenta.type,
            NESTEROV=nesterov, K=K, ROWS=tiling.rows, COLUMNS=tiling.columns, num_warps=tiling.num_warps,
        )  # fmt: skip
        return partial

    def apply(self, first: int, q: Tensor, x: Tensor, scratch: Tensor, decay: float, scale: float) -> None:
        """Compute W ← decay·W − scale·Q·X for the matrices from `first` on, and the parameters' casts."""
        weights, params, layout = self._weights, self._params, self.layout
        tables = weights.table, params.table, self._active
        types = {
            "WEIGHT": weights.type, "PARAM": params.type,
            "HAS_MASTERS": self._has_masters, "TRANSPOSED": layout.transposed, "K": self.stack,
        }  # fmt: skip
        if self._fused:
            config = LAST_PRODUCT["weights"]
            tiles = cdiv(self.m, config.rows) * cdiv(self.n, config.columns)
            launcher(_teon_last_product_kernel, (x.shape[0] * self.stack * tiles,))(
                *layout.factors(q, x, config), *tables, first, self.E, self.m, self.n, layout.rows, decay, scale, tiles,
                **types, ROWS=config.rows, COLUMNS=config.columns, INNER=config.inner,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
            return
        tiling = tiling_of(self.m, self.n, across=layout.transposed)
        launcher(_teon_weight_kernel, (x.shape[0] * self.stack * tiling.count,))(
            torch.bmm(q, x, out=scratch), *tables, first, self.E, self.m, self.n, layout.rows, layout.columns,
            decay, scale, tiling.count, **types,
            ROWS=tiling.rows, COLUMNS=tiling.columns, num_warps=tiling.num_warps,
        )  # fmt: skip


def teon_update_triton(*args: Any) -> None:
    """Compute what `teon_update_reference` does with float16 storage; torch computes the products."""
    _teon_update(torch_product, *args)


def teon_update_cuda(*args: Any) -> None:
    """Compute the same with the CUDA kernel's symmetric products."""
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
    active: Tensor | None = None,
) -> None:
    """Run the update in batches that fit the workspace, with `product` for the symmetric products."""
    if not params[0].numel():
        return
    step = TeonCall(params, grads, momenta, masters, stack, active)
    m, n, layout, steps = step.m, step.n, step.layout, triples(coefficients)
    batches = layout.batches(step.count)
    memory = [layout.empty(batches[0].stop, params[0]) for _ in range(2)]
    for batch in batches:
        count = batch.stop - batch.start
        wide, scratch = (half[:count] for half in memory)
        u = scratch.view(-1)[: count * m * stack * n].view(DIRECTION).view(count, m, stack * n)
        layout.normalise(u, step.directions(batch.start, u, momentum, nesterov), wide)
        q, wide, scratch = iterate(wide, scratch, steps, "gram", product)
        step.apply(batch.start, q, wide, scratch, 1 - lr * weight_decay, lr * math.sqrt(m / n))
