"""Tiles, states and slices of the Mamba-2 scan: TMA descriptors, loads and stores."""

from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from yaongi.kernels.common.descriptors import descriptor
from yaongi.kernels.common.generations import for_gpu
from yaongi.kernels.common.sizes import next_power_of_2

Tensor = torch.Tensor
Part = TypeVar("Part", Tensor, Tensor | None)


@dataclass(frozen=True)
class Config:
    """Launch options of a kernel."""

    num_warps: int
    num_stages: int


BLOCK_P = {8: {2: 32, 4: 32}, 9: {2: 64, 4: 32}}  # by GPU generation and bytes per element


@triton.jit
def load_tile(desc, batch, row, head, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load rows of one head of a (B, heads, L, columns) tensor; zeros beyond its end."""
    return desc.load([batch, head, row, column]).reshape(ROWS, COLUMNS)


@triton.jit
def store_tile(desc, batch, row, head, column, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store rows of one head of a (B, heads, L, columns) tensor; rows beyond its end are dropped."""
    desc.store([batch, head, row, column], tile.to(desc.dtype).reshape(1, 1, ROWS, COLUMNS))


@triton.jit
def load_state(desc, row, column, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load a state (P, N) transposed."""
    return desc.load([row, column, 0]).reshape(BLOCK_P, BLOCK_N).T


@triton.jit
def store_state(desc, row, column, state, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store a transposed state as (P, N)."""
    desc.store([row, column, 0], state.T.reshape(1, BLOCK_P, BLOCK_N))


@triton.jit
def scaled(tile, weight):
    """Return a tile with its rows scaled in fp32 by `weight`, rounded to the tile's dtype."""
    return (tile.to(tl.float32) * weight[:, None]).to(tile.dtype)


def _heads_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2)


def _listed(states: Tensor) -> Tensor:
    return states.view(-1, *states.shape[-2:])


def by_head(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Return a TMA descriptor for boxes of rows × columns of one head (or group) of a (B, L, heads, columns) tensor."""
    return descriptor(t, rows, columns, view=_heads_first)


def state_descriptor(t: Tensor | None, block_p: int, block_n: int) -> TensorDescriptor | None:
    """Return a TMA descriptor for blocks of states (…, P, N)."""
    return None if t is None else descriptor(t, block_p, block_n, view=_listed)


def state_block(x: Tensor, N: int) -> tuple[int, int]:
    """Return the tile of a state: a block of P, all of N (padded to a power of two)."""
    block_p = min(for_gpu(BLOCK_P, x)[x.element_size()], next_power_of_2(x.shape[3]))
    return max(16, block_p), max(16, next_power_of_2(N))


def cut(t: Part, part: slice, dim: int = 2) -> Part:
    """Return some of the heads or groups, the tensor itself if all: a view costs the host microseconds."""
    if t is None or part == slice(0, t.shape[dim]):
        return t
    return t.narrow(dim, part.start, part.stop - part.start)
