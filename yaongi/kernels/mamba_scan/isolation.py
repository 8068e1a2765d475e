"""What is not finite stays in its document.

A fast walk multiplies the tokens of other documents by a decay of zero, and 0 · NaN is NaN. Its state, or its sums,
keep what it met, so one look at the end finds it: the program sets its flag. The same kernel is then launched again
with ISOLATE. Where a flag is set, its program does the work anew: the tokens that a value which is not finite reaches
within their document are left out of every product, and their results are NaN. All other programs return at once.
Flags are int32, 0 or 1.
"""

import torch
import triton
import triton.language as tl

from yaongi.kernels.mamba_scan.tiles import Config

Tensor = torch.Tensor
ISOLATING = Config(num_warps=8, num_stages=1)  # the launch that only flagged programs do not leave at once


@triton.jit
def program():
    """Return the program's number, the place of its flag."""
    return (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def not_finite(value):
    """Return for each element whether it is NaN or infinite."""
    return tl.where(tl.abs(value.to(tl.float32)) < float("inf"), 0, 1)


@triton.jit
def any_not_finite(tile):
    """Return whether a tile holds a NaN or an infinity: 0 · v is NaN for those, in one addition an element."""
    zero = tl.sum(tile.to(tl.float32) * 0.0)
    return (zero != zero).to(tl.int32)


@triton.jit
def broken_rows(tile):
    """Return for each row of a tile whether it holds a NaN or an infinity."""
    return tl.max(not_finite(tile), 1)


@triton.jit
def load_documents(document_ptr, batch, start, length, CHUNK: tl.constexpr):
    """Load the document ids of a chunk, of the token before it and of its last; the ends' ids go on beyond them."""
    document_ptr += batch.to(tl.int64) * length
    documents = tl.load(document_ptr + tl.minimum(start + tl.arange(0, CHUNK), length - 1))
    before = tl.load(document_ptr + tl.maximum(start - 1, 0))
    last = tl.load(document_ptr + tl.minimum(start + CHUNK, length) - 1)
    return documents, before, last


@triton.jit
def reached_by(broken, documents):
    """Return which tokens of a chunk share a document with a broken one."""
    same = documents[:, None] == documents[None, :]
    return tl.max(tl.where(same, broken[None, :], 0), 1)


@triton.jit
def lost_tokens(broken, state_lost, documents, entering):
    """Return which tokens of a chunk a broken one reaches, or the state that enters from a document."""
    return reached_by(broken, documents) | (state_lost & (documents == entering).to(tl.int32))


@triton.jit
def lost_at(lost, documents, leaving):
    """Return whether the tokens of one document are lost, and with them the state that it passes on."""
    return tl.max(lost & (documents == leaving).to(tl.int32))


@triton.jit
def kept(value, lost):
    """Return a value, or zero where it is lost."""
    return tl.where(lost != 0, 0.0, value).to(value.dtype)


@triton.jit
def kept_rows(tile, lost):
    """Return a tile with zeros in the rows that are lost."""
    return kept(tile, lost[:, None])


@triton.jit
def marked_rows(tile, lost):
    """Return a tile with NaN in the rows that are lost."""
    return tl.where(lost[:, None] != 0, float("nan"), tile)


def flags_for(documents: Tensor | None, programs: int, like: Tensor) -> Tensor | None:
    """Return room for the flags of a launch, or None without documents: then nothing has to be kept apart."""
    return None if documents is None else torch.empty(programs, dtype=torch.int32, device=like.device)


def launches_for(flags: Tensor | None) -> tuple[bool, ...]:
    """Return ISOLATE of each launch: with flags there is a second one, for the programs that are flagged."""
    return (False,) if flags is None else (False, True)
