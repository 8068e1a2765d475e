"""The RMS norms in Triton: one memory-bound kernel per direction.

Each program takes a block of rows of one group of channels; `rms_norm` has one group. The forward reads each input once
and writes each output once. The backward recomputes the forward; each program walks over many blocks and keeps its
partial sum of the weight's gradient in registers. The partial sums are added in a fixed order, so the result is bitwise
reproducible.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from yaongi.kernels.common.column_sums import column_sums
from yaongi.kernels.common.early_launch import early_launch, fetch_into_l2, let_next_start, wait_for_previous
from yaongi.kernels.common.launch import launcher
from yaongi.kernels.common.sizes import cdiv, next_power_of_2

Tensor = torch.Tensor


@dataclass(frozen=True)
class Config:
    """Size of a program's block, rows × one group: about `elements` elements, but at least one row."""

    elements: int
    elements_per_warp: int  # LONG_ROW instead for a row longer than `elements`: more would spill registers


LONG_ROW = 512
FORWARD = Config(elements=2048, elements_per_warp=512)
BACKWARD = Config(elements=2048, elements_per_warp=1024)
# Pipeline stages by bytes per element: 16-bit rows are prefetched while the previous rows are computed.
STAGES = {2: 2, 4: 1}
FEW_ROWS = 128  # up to so many, as in a step of generation, the kernel is over so soon that its launch counts
PROGRAMS = 528  # of the backward kernel: four for each of an H100's 132 multiprocessors


@triton.jit
def _load(ptr, place, mask):
    return tl.load(ptr + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _norm_kernel(
    x_ptr,  # (T, D)
    other_ptr,  # (T, D), the gate z or the residual
    weight_ptr,  # (D)
    y_ptr,  # (T, D), contiguous
    sum_ptr,  # (T, D), contiguous
    T,
    D,
    size,
    eps,
    stride_x,
    stride_o,
    GATED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
    LINES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute y = u·r·w, where u is x, x + residual (also stored), or x·silu(z)."""
    let_next_start(EARLY)
    fetch_into_l2(weight_ptr + tl.program_id(1) * size + tl.minimum(tl.arange(0, LINES) * 64, size - 1), EARLY)
    wait_for_previous(EARLY)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    mask, channel = (row < T) & (i < size), tl.program_id(1) * size + i
    u = _load(x_ptr, row * stride_x + channel, mask)
    weight = _load(weight_ptr, channel, i < size)
    if GATED:
        z = _load(other_ptr, row * stride_o + channel, mask)
        u *= z * tl.sigmoid(z)
    if HAS_RESIDUAL:
        total = (u + _load(other_ptr, row * stride_o + channel, mask)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + channel, total, mask=mask)
        u = total.to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt_rn(tl.sum(u * u, 1) / size + eps)
    y = u * inverse_rms[:, None] * weight
    tl.store(y_ptr + row * D + channel, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward_kernel(
    dy_ptr,  # (T, D)
    extra_ptr,  # (T, D), the returned sum's gradient
    u_ptr,  # (T, D), the normalised input; x where gated
    z_ptr,  # (T, D)
    weight_ptr,  # (D)
    du_ptr,  # (T, D), contiguous; dx where gated
    dz_ptr,  # (T, D)
    partial_ptr,  # (programs, D), fp32: the weight's gradient
    T,
    D,
    size,
    eps,
    stride_y,
    stride_e,
    stride_u,
    stride_z,
    stride_dz,
    GATED: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute du = r·(g − n·mean(g·n)) with g = dy·w and n = u·r.

    With a gate also dx = du·z·σ and dz = du·x·σ·(1 + z·(1 − σ)).
    """
    i = tl.arange(0, BLOCK)[None, :]
    channel = tl.program_id(1) * size + i
    weight = _load(weight_ptr, channel, i < size)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < T) & (i < size)
        u = _load(u_ptr, row * stride_u + channel, mask)
        dy = _load(dy_ptr, row * stride_y + channel, mask)
        x, swish, slope = u, u, u
        if GATED:
            z = _load(z_ptr, row * stride_z + channel, mask)
            gate = tl.sigmoid(z)
            swish, slope = z * gate, gate * (1.0 + z * (1.0 - gate))
            u = x * swish
        inverse_rms = (1.0 / tl.sqrt_rn(tl.sum(u * u, 1) / size + eps))[:, None]
        normalised = u * inverse_rms
        dweight += dy * normalised
        dnormalised = dy * weight
        mean = (tl.sum(dnormalised * normalised, 1) / size)[:, None]
        du = inverse_rms * (dnormalised - normalised * mean)
        if HAS_EXTRA:
            du += _load(extra_ptr, row * stride_e + channel, mask)
        if GATED:
            dz = du * x * slope
            tl.store(dz_ptr + row * stride_dz + channel, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            du *= swish
        tl.store(du_ptr + row * D + channel, du.to(du_ptr.dtype.element_ty), mask=mask)
    place = partial_ptr + tl.program_id(0).to(tl.int64) * D + channel
    tl.store(place, tl.sum(dweight, 0)[None, :], mask=i < size)


def row_blocks(config: Config, size: int) -> dict[str, int]:
    """Return the launch constants for groups of `size` channels."""
    block = next_power_of_2(size)
    rows = max(1, config.elements // block)
    per_warp = config.elements_per_warp if block <= config.elements else LONG_ROW
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(16, rows * block // per_warp))}


def _rows(t: Tensor) -> Tensor:
    """Return (…, D) as (T, D), a view where the strides allow."""
    return t.reshape(-1, t.shape[-1])


def _forward(
    x: Tensor, other: Tensor | None, weight: Tensor, eps: float, groups: int, y: Tensor, total: Tensor | None
) -> None:
    """Write y. With `total`, `other` is the residual and their sum is written to `total`; else `other` is the gate."""
    if not x.numel():
        return
    rows, size = _rows(x), x.shape[-1] // groups
    others = None if other is None else _rows(other)
    blocks = row_blocks(FORWARD, size)
    launcher(_norm_kernel, (cdiv(rows.shape[0], blocks["ROWS"]), groups))(
        rows,
        others,
        weight.contiguous(),
        y,
        total,
        rows.shape[0],
        x.shape[-1],
        size,
        eps,
        rows.stride(0),
        0 if others is None else others.stride(0),
        GATED=other is not None and total is None,
        HAS_RESIDUAL=total is not None,
        **(early_launch(x) if rows.shape[0] <= FEW_ROWS else {"EARLY": False}),
        LINES=max(1, blocks["BLOCK"] // 64),  # of 128 bytes, in 16 bits
        **blocks,
    )


def fill_gradients(
    dy: Tensor,
    extra: Tensor | None,
    u: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    groups: int,
    du: Tensor,
    dz: Tensor | None,
) -> Tensor:
    """Write du (contiguous) and, with a gate z, dz (which may be a slice); return the weight's gradient."""
    width = u.shape[-1]
    if not u.numel():
        return torch.zeros(width, dtype=torch.float32, device=u.device)
    dys, us, dus = _rows(dy), _rows(u), _rows(du)
    extras, zs, dzs = (None if t is None else _rows(t) for t in (extra, z, dz))
    size = width // groups
    blocks = row_blocks(BACKWARD, size)
    programs = min(cdiv(us.shape[0], blocks["ROWS"]), cdiv(PROGRAMS, groups))
    partial = torch.empty(programs, width, dtype=torch.float32, device=u.device)
    launcher(_norm_backward_kernel, (programs, groups))(
        dys,
        extras,
        us,
        zs,
        weight.contiguous(),
        dus,
        dzs,
        partial,
        us.shape[0],
        width,
        size,
        eps,
        dys.stride(0),
        *(0 if t is None else t.stride(0) for t in (extras,)),
        us.stride(0),
        *(0 if t is None else t.stride(0) for t in (zs, dzs)),
        GATED=z is not None,
        HAS_EXTRA=extra is not None,
        STAGES=STAGES[u.element_size()],
        **blocks,
    )
    return column_sums(partial[None])[0]


def rms_norm_triton(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Compute what `rms_norm_reference` does."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    _forward(x, residual, weight, eps, 1, y, total)
    return y, x.new_empty(0) if total is None else total


def rms_norm_backward_triton(
    dy: Tensor, dsum: Tensor | None, u: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute what `rms_norm_backward_reference` does."""
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    return du, fill_gradients(dy, dsum, u, None, weight, eps, 1, du, None)


def gated_rms_norm_triton(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """Compute what `gated_rms_norm_reference` does."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _forward(x, z, weight, eps, groups, y, None)
    return y


def gated_rms_norm_backward_triton(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `gated_rms_norm_backward_reference` does."""
    dx, dz = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, z))
    return dx, dz, fill_gradients(dy, None, x, z, weight, eps, groups, dx, dz)
