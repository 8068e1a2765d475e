"""`likeliest`: the token with the largest logit."""

from typing import Any

import pytest
import torch
from support import assert_refused, backends, bad_calls, device_of

from yaongi.kernels import likeliest, use_backend

inf, nan = torch.inf, torch.nan


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("V", [1, 7, 1024, 1025, 32768, 70000])
def test_of_the_largest_logits_the_first(V: int, dtype: torch.dtype, backend: str) -> None:
    """Rounded to few values, so that the largest one is there often; in rows of a wider tensor."""
    logits = torch.randn(5, V + 16).round().to(device_of(backend, "likeliest"), dtype)[:, 8 : V + 8]
    logits[3] -= 1000
    with use_backend(backend):  # type: ignore[arg-type]
        ids = likeliest(logits)
    assert ids.dtype == torch.int64
    for row, token in zip(logits.tolist(), ids.tolist(), strict=True):
        assert token == row.index(max(row))


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_edges(dtype: torch.dtype, backend: str) -> None:
    """Signed zeros are equal, −∞ is never chosen, and what is no distribution is marked; a row of any length."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    rows = {
        (-0.0, 0.0, -1.0): 0,
        (-1.0, 0.0, -0.0): 1,
        (-inf, -largest, -inf): 1,
        (-smallest, -0.0, -smallest): 1,
        (0.0, smallest, largest): 2,
        (-inf, -inf, -inf): -1,
        (0.0, inf, 0.0): -1,
        (-inf, 0.0, nan): -1,
        (inf, -nan, 0.0): -1,
    }
    logits = torch.tensor(list(rows)).to(device_of(backend, "likeliest"), dtype)
    for shape in ((9, 3), (9, 2000)):
        padded = torch.full(shape, -inf).to(logits)
        padded[:, -3:] = logits
        with use_backend(backend):  # type: ignore[arg-type]
            ids = likeliest(padded).tolist()
        assert ids == [wanted if wanted < 0 else wanted + shape[1] - 3 for wanted in rows.values()]
    assert likeliest(logits[:0]).shape == (0,)


def test_opcheck_and_no_gradient() -> None:
    logits = torch.randn(3, 9, requires_grad=True)
    torch.library.opcheck(torch.ops.yaongi.likeliest.default, (logits.detach(),))
    assert not likeliest(logits).requires_grad


@bad_calls(
    [
        ({"logits": [1.0]}, TypeError, "logits must be a tensor, got list"),
        ({"logits": torch.ones(3)}, ValueError, "logits must be (B, V), got (3,)"),
        ({"logits": torch.ones(3, 0)}, ValueError, "logits must be (B, V) with V >= 1, got (3, 0)"),
        (
            {"logits": torch.ones(3, 2).int()},
            TypeError,
            "logits must be float16 or bfloat16 or float32 or float64, got int32",
        ),
    ]
)
def test_bad_arguments(bad: Any) -> None:
    assert_refused(likeliest, {"logits": torch.ones(3, 8)}, bad)
