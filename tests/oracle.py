"""The tolerance rule of every kernel test (quack's rule, and a bound for each row).

`exact` is the reference in float64, and `plain` the reference in the kernel's own dtype. A kernel's error may be at
most twice that of the plain computation: max|kernel − exact| ≤ 2·max|plain − exact| + tiny. That says little of rows
whose values are small. So in each row of 16 or more the error may be at most four times the plain one's in that row,
plus a share of the row's largest value: 0.1 % and eight times the plain computation's relative error.
"""

import torch

# FP8. A cast may fall on the other side of a boundary where float32 itself was rounded: this share, by one code each.
FLIPPED_CODES = 1e-4
# Relative Frobenius errors of products of codes against float64: results in float32, of zero mean and of one sign, and
# in bfloat16. By `exact`.
PRODUCT_ERRORS = {True: {"zero mean": 5e-4, "one sign": 1.2e-3}, False: {"zero mean": 4e-3, "one sign": 0.25}}
BFLOAT16_PRODUCT_ERROR = 2.5e-3
# The experts' results in FP8 against their emulation: twice the most that an H100 showed (1.22e-2, dg at D 2688 and
# F 1856). By the tensor cores' errors (8e-4 at K = 2048) 2 % of the codes of A and dH lie beyond a boundary.
EXPERTS_ERROR = 2.5e-2
SMALLEST = 1e-35  # kernels flush denormals, and what is computed from them
ROW = 1e-3  # of a row's largest value; the scan's float32 gradients have this error at step sizes of 1e4
TINY = 1e-6  # tolerance for a plain result that happens to be exact; relative to the largest exact value


def assert_close(
    kernel: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, name: str = "result", by_rows: bool = True
) -> None:
    """Assert the rule for one tensor; on failure, print the error, the allowed error and the worst element."""
    assert kernel.shape == exact.shape == plain.shape, f"{name}: shape {tuple(kernel.shape)} != {tuple(exact.shape)}"
    assert kernel.dtype == plain.dtype, f"{name}: dtype {kernel.dtype} != {plain.dtype}"
    if not kernel.numel():
        return
    exact = exact.double()
    error = (kernel.double() - exact).abs()
    allowed = 2 * (plain.double() - exact).abs().max() + TINY * exact.abs().max().clamp(min=TINY)
    assert error.isfinite().all(), f"{name}: {int((~error.isfinite()).sum())} non-finite values"
    worst = int(error.argmax())
    assert error.max() <= allowed, (
        f"{name}: error {error.max():.3e} > allowed {allowed:.3e} at flat index {worst} of {tuple(kernel.shape)}: "
        f"got {kernel.flatten()[worst]:.6g}, exact {exact.flatten()[worst]:.6g}"
    )
    if by_rows:
        assert_rows_close(kernel, exact, plain, error, name)


def assert_rows_close(
    kernel: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, error: torch.Tensor, name: str
) -> None:
    """Assert the bound of each row, the last dimension; short rows say too little of the plain computation's error."""
    if kernel.dim() < 2 or kernel.shape[-1] < 16 or not kernel.is_floating_point():
        return
    plain_error, scale = (plain.double() - exact).abs(), exact.abs().amax(-1)
    relative = 8 * plain_error.max() / scale.max().clamp(min=SMALLEST) + ROW
    allowed = 4 * plain_error.amax(-1) + relative * scale + SMALLEST
    excess = (error.amax(-1) - allowed).flatten()
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"{name}: error {error.amax(-1).flatten()[worst]:.3e} > allowed {allowed.flatten()[worst]:.3e} in row {worst}, "
        f"whose largest value is {exact.abs().amax(-1).flatten()[worst]:.3e}"
    )


def assert_equal_to_float64(actual: torch.Tensor, exact: torch.Tensor, relative: float, name: str = "result") -> None:
    """Assert max|actual − exact| ≤ relative · max|exact|, for results computed in float32 or float64 throughout."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(exact.shape)}"
    if actual.numel():
        error = (actual.double() - exact.double()).abs().max()
        allowed = relative * exact.double().abs().max().clamp(min=1e-30)
        assert error <= allowed, f"{name}: error {error:.3e} > {allowed:.3e}"


def frobenius_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Return ‖actual − exact‖ / ‖exact‖."""
    exact = exact.double()
    return float((actual.double() - exact).norm() / exact.norm())


def assert_codes_close(actual: torch.Tensor, expected: torch.Tensor, name: str = "codes") -> None:
    """Assert that 8-bit floats are equal but for few, which are off by one code; NaN is any NaN."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} != {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    if actual.numel():
        steps = (_ordinal(actual) - _ordinal(expected)).abs()
        assert steps.max() <= 1, f"{name}: off by {int(steps.max())} codes at flat index {int(steps.argmax())}"
        share = float(steps.double().mean())
        assert share <= FLIPPED_CODES, f"{name}: {share:.2e} of the codes differ, allowed {FLIPPED_CODES:.0e}"


def _ordinal(codes: torch.Tensor) -> torch.Tensor:
    """Number the codes in the order of their values; ±0 have one number, NaNs one."""
    bits = codes.contiguous().view(torch.uint8).int()
    signed = (bits & 127) * (1 - 2 * (bits >> 7))
    return torch.where(codes.half().isnan(), 10_000, signed)
