"""Check the experts' weight gradients in CUDA against float64 sums over each expert's rows, on an H100."""

import pytest
import torch

from yaongi.kernels.backend import OPS, cuda_launcher, unavailable

pytestmark = pytest.mark.gpu

COUNTS = {
    "one expert": [200],
    "ends within a stage": [1, 31, 32, 33, 63, 64, 65, 129],
    "empty experts": [0, 40, 0, 0, 300, 0],
    "no rows at all": [0, 0, 0],
    "more tiles than multiprocessors": [17 + i % 90 for i in range(64)],
}
WIDTHS = [(16, 16), (48, 272), (240, 128), (384, 768), (512, 2048)]


def problem(counts: list[int], R: int, G: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return rows, gathered, token and offset; what lies behind the last expert's rows is NaN."""
    torch.manual_seed(0)
    pairs, tokens = sum(counts), 100
    rows = torch.randn(pairs + 70, R, device="cuda").to(dtype)
    rows[pairs:] = torch.nan
    gathered = torch.randn(tokens, 2 * G, device="cuda").to(dtype)[:, :G]  # not contiguous
    token = torch.randint(0, tokens, (pairs + 70,), device="cuda").int()
    token[pairs:] = 2**30  # far outside: never read
    offset = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
    return rows, gathered, token, offset


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("gather_left", [False, True])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("counts", COUNTS)
def test_sums_of_every_expert(
    counts: str, widths: tuple[int, int], gather_left: bool, wide: bool, reduce: bool
) -> None:
    """Every element is within float32's rounding of the sum's terms, and two calls give the same bits."""
    assert unavailable("cuda") is None, unavailable("cuda")
    (R, G), dtype = widths, torch.float16 if widths[0] == 240 else torch.bfloat16
    rows, gathered, token, offset = problem(COUNTS[counts], R, G, dtype)
    before = torch.randn(len(offset) - 1, *((G, R) if gather_left else (R, G)), device="cuda")
    once, twice = before.clone(), before.clone()
    for total in (once, twice):
        cuda_launcher("moe_weight_gradient")(rows, gathered, token, offset, total, gather_left, wide, reduce)
    assert torch.equal(once, twice)
    for expert, (start, end) in enumerate(zip(offset[:-1].tolist(), offset[1:].tolist(), strict=True)):
        if start == end:
            assert torch.equal(once[expert], before[expert])
            continue
        left, right = rows[start:end].double(), gathered[token[start:end]].double()
        if gather_left:
            left, right = right, left
        wanted = before[expert].double() + left.T @ right
        terms = before[expert].abs().double() + left.T.abs() @ right.abs()
        assert ((once[expert] - wanted).abs() <= 2.0**-19 * terms).all(), expert


def test_the_backward_pass_takes_it() -> None:
    """On an H100 the sums are added in CUDA, elsewhere in Triton; the op is the same."""
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    x, w_up, w_down = torch.randn(64, 32, **bf16), torch.randn(4, 48, 32, **bf16), torch.randn(4, 32, 48, **bf16)
    ids = torch.randint(0, 4, (64, 1), device="cuda").int()
    weights, a = torch.rand(64, 1, device="cuda"), torch.rand(64, 48, **bf16)
    sums = [torch.zeros(w.shape, device="cuda") for w in (w_up, w_down)]
    args = (x, x, w_up, w_down, ids, weights, a, *sums)
    op = OPS["moe_backward_accumulate"]
    assert op.pick(args) == ("cuda" if unavailable("cuda") is None else "triton")
    other = [torch.zeros_like(t) for t in sums]
    cuda = op.run(*args)
    triton = op.implementation("triton")(*args[:-2], *other)
    for got, wanted in zip(cuda, triton, strict=True):
        assert torch.equal(got, wanted)
    for got, wanted in zip(sums, other, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
