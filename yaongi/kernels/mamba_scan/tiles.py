"""Tiles and states of the Mamba-2 scan: descriptors, and loads and stores through TMA."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from yaongi.kernels.common.descriptors import descriptor

Tensor = torch.Tensor


@dataclass(frozen=True)
class Config:
    """How a kernel is run."""

    num_warps: int
    num_stages: int


BLOCK_P = {2: 64, 4: 32}


@triton.jit
def load_tile(desc, batch, row, head, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of one head of a (B, heads, L, columns) tensor, zeros beyond its end."""
    return desc.load([batch, head, row, column]).reshape(ROWS, COLUMNS)


@triton.jit
def store_tile(desc, batch, row, head, column, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The same rows, stored; what lies beyond the end is dropped."""
    desc.store([batch, head, row, column], tile.to(desc.dtype).reshape(1, 1, ROWS, COLUMNS))


@triton.jit
def load_state(desc, row, column, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """A state (P, N), transposed."""
    return desc.load([row, column, 0]).reshape(BLOCK_P, BLOCK_N).T


@triton.jit
def store_state(desc, row, column, state, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """A transposed state, stored as (P, N)."""
    desc.store([row, column, 0], state.T.reshape(1, BLOCK_P, BLOCK_N))


@triton.jit
def scaled(tile, weight):
    """A tile, its rows weighted, rounded to its dtype again."""
    return (tile.to(tl.float32) * weight[:, None]).to(tile.dtype)


def by_head(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of rows × columns of one head (or group) of a (B, L, heads, columns) tensor."""
    return descriptor(t.transpose(1, 2), rows, columns)


def state_descriptor(t: Tensor | None, block_p: int, block_n: int) -> TensorDescriptor | None:
    """Boxes of states (…, P, N)."""
    return None if t is None else descriptor(t.view(-1, *t.shape[-2:]), block_p, block_n)


def state_block(x: Tensor, N: int) -> tuple[int, int]:
    """The tile of a state: a block of P, all of N."""
    block_p = min(BLOCK_P[x.element_size()], triton.next_power_of_2(x.shape[3]))
    return max(16, block_p), max(16, triton.next_power_of_2(N))
