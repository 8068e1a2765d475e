"""Floats as integers of the same order."""

import triton
import triton.language as tl


@triton.jit
def rank(value):
    """Return an int32 that orders floats as torch's sort does: −∞ first, −0 equal to 0, NaN after ∞."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value != value, 0x7FFFFFFF, ordered)
