"""FP8 in Triton: the cast, and the largest magnitude of what is cast."""

import triton
import triton.language as tl


@triton.jit
def cast8(values, scale, dtype: tl.constexpr):
    """Return values · scale in E4M3: to nearest even and saturated by the hardware's cast; NaN stays NaN."""
    return (values * scale).to(dtype)


@triton.jit
def note_largest(amax_ptr, values):
    """Set *amax to the largest of itself and |values|; `amax_ptr` points to int32, the bits of a float32.

    Integers order the magnitudes of floats as the floats do, with infinity and NaN above all. So the result doesn't
    depend on the order of the programs.
    """
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(amax_ptr, tl.max(bits), sem="relaxed")
