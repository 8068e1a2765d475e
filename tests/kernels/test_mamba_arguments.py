"""The arguments that `mamba_scan` and `mamba_step` refuse, and their messages."""

from collections.abc import Iterator
from typing import Any

import torch
from mamba_support import arguments
from support import assert_refused, bad_calls, checked_mode

from yaongi.kernels import mamba_scan, mamba_step

GOOD = arguments((2, 4, 3, 2, 5), 6, (2, 4), dtype=torch.float32)  # B 2, L 6, H 4, P 3, G 2, N 5


GOOD_STEP = {
    "state": torch.ones(2, 4, 3, 5),
    "x": torch.ones(2, 4, 3),
    "dt": torch.ones(2, 4),
    "A": -torch.ones(4),
    "b": torch.ones(2, 2, 5),
    "c": torch.ones(2, 2, 5),
    "D": torch.ones(4),
    "dt_bias": torch.ones(4),
}


FLOATS = "must be float16 or bfloat16 or float32 or float64, got"


TENSOR = "must be a tensor, got"


ON_META = "must be on cpu like the first tensor, got meta"


def bad_values(good: dict[str, Any]) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    """Yield bad calls for checked mode."""
    for name, value in good.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            spoiled = torch.full(value.shape, -torch.inf if name == "A" else torch.nan)
            yield {name: spoiled}, ValueError, f"{name} must be finite, got {value.numel()} non-finite values"
    positive = torch.tensor([-1.0, 0.5, 0.0, -2.0])
    yield {"A": positive}, ValueError, "A must be negative, got a largest value of 0.5"
    if "document_ids" in good:
        ids = good["document_ids"].flip(1)
        yield {"document_ids": ids}, ValueError, "document_ids must be non-decreasing along L, got a decreasing pair"


@bad_calls(bad_values(GOOD))
def test_checked_mode(bad: Any) -> None:
    with checked_mode():
        mamba_scan(**GOOD)
        assert_refused(mamba_scan, GOOD, bad)
    mamba_scan(**GOOD | bad.changes)


@bad_calls(bad_values(GOOD_STEP))
def test_checked_mode_of_the_step(bad: Any) -> None:
    with checked_mode():
        assert_refused(mamba_step, GOOD_STEP, bad)


def bad_parameters() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    """Yield bad calls that scan and step share; H is 4."""
    ones, meta = torch.ones, torch.device("meta")
    yield {"A": -1.0}, TypeError, f"A {TENSOR} float"
    yield {"A": None}, TypeError, f"A {TENSOR} NoneType"
    yield {"A": -ones(4).bfloat16()}, TypeError, "A must be float32 or float64, got bfloat16"
    yield {"A": -ones(5)}, ValueError, "A must be (H) = (4), got (5,)"
    yield {"A": -ones(4, 1)}, ValueError, "A must be (H) = (4), got (4, 1)"
    yield {"A": ones(4, device=meta)}, TypeError, f"A {ON_META}"
    for name in ("D", "dt_bias"):
        yield {name: 1.0}, TypeError, f"{name} {TENSOR} float"
        yield {name: ones(4).int()}, TypeError, f"{name} {FLOATS} int32"
        yield {name: ones(3)}, ValueError, f"{name} must be (H) = (4), got (3,)"
        yield {name: ones(4, 3)}, ValueError, f"{name} must be (H) = (4), got (4, 3)"
        yield {name: ones(4, device=meta)}, TypeError, f"{name} {ON_META}"


def bad_options() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    """Yield changes of GOOD's keyword arguments that make a bad call."""
    ids, meta = GOOD["document_ids"], torch.device("meta")
    yield {"document_ids": ids.tolist()}, TypeError, f"document_ids {TENSOR} list"
    yield {"document_ids": ids.long()}, TypeError, "document_ids must be int32, got int64"
    yield {"document_ids": ids[0]}, ValueError, "document_ids must be (B, L) = (2, 6), got (6,)"
    yield {"document_ids": ids[:, 1:]}, ValueError, "document_ids must be (B, L) = (2, 6), got (2, 5)"
    yield {"document_ids": ids.to(meta)}, TypeError, f"document_ids {ON_META}"
    yield {"initial_state": 0}, TypeError, f"initial_state {TENSOR} int"
    state, wanted = torch.ones(2, 4, 3, 5), "initial_state must be (B, H, P, N) = (2, 4, 3, 5), got"
    yield {"initial_state": state.half()}, TypeError, "initial_state must be float32 or float64, got float16"
    yield {"initial_state": state[0]}, ValueError, f"{wanted} (4, 3, 5)"
    yield {"initial_state": state.mT}, ValueError, f"{wanted} (2, 4, 5, 3)"
    yield {"initial_state": state.to(meta)}, TypeError, f"initial_state {ON_META}"
    yield {"return_final_state": "yes"}, TypeError, "return_final_state must be a bool, got str"
    yield {"return_final_state": 0}, TypeError, "return_final_state must be a bool, got int"


def bad_arguments() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    """Yield changes of GOOD that make a bad call."""
    ones, meta = torch.ones, torch.device("meta")
    yield from bad_parameters()
    yield from bad_options()
    yield {"x": None}, TypeError, f"x {TENSOR} NoneType"
    yield {"x": ones(2, 6, 4, 3).long()}, TypeError, f"x {FLOATS} int64"
    yield {"x": ones(2, 6, 4, 3).half()}, TypeError, "b must be float16, got float32"
    yield {"x": ones(2, 6, 12)}, ValueError, "x must be (B, L, H, P), got (2, 6, 12)"
    yield {"x": ones(2, 0, 4, 3)}, ValueError, "x must be (B, L, H, P) with L >= 1, got (2, 0, 4, 3)"
    yield {"x": ones(2, 6, 5, 3)}, ValueError, "dt must be (B, L, H) = (2, 6, 5), got (2, 6, 4)"
    yield {"x": ones(2, 6, 4, 2)}, ValueError, "initial_state must be (B, H, P, N) = (2, 4, 2, 5), got (2, 4, 3, 5)"
    yield {"x": ones(2, 6, 3, 4).mT}, ValueError, "x must have stride 1 along P, got strides (72, 12, 1, 4)"
    yield {"x": ones(2, 6, 4, 3, device=meta)}, TypeError, "dt must be on meta like the first tensor, got cpu"
    yield {"dt": 0.1}, TypeError, f"dt {TENSOR} float"
    yield {"dt": ones(2, 6, 4).int()}, TypeError, f"dt {FLOATS} int32"
    yield {"dt": ones(2, 6)}, ValueError, "dt must be (B, L, H) = (2, 6, 4), got (2, 6)"
    yield {"dt": ones(2, 4, 6)}, ValueError, "dt must be (B, L, H) = (2, 6, 4), got (2, 4, 6)"
    yield {"dt": ones(2, 6, 4, device=meta)}, TypeError, f"dt {ON_META}"
    for name, good in (("b", "(2, 6, G, N)"), ("c", "(2, 6, 2, 5)")):
        yield {name: None}, TypeError, f"{name} {TENSOR} NoneType"
        yield {name: ones(2, 6, 2, 5).bfloat16()}, TypeError, f"{name} must be float32, got bfloat16"
        yield {name: ones(2, 6, 10)}, ValueError, f"{name} must be (B, L, G, N) = {good}, got (2, 6, 10)"
        yield {name: ones(2, 5, 2, 5)}, ValueError, f"{name} must be (B, L, G, N) = {good}, got (2, 5, 2, 5)"
        yield {name: ones(2, 6, 5, 2).mT}, ValueError, f"{name} must have stride 1 along N, got strides (60, 10, 1, 2)"
        yield {name: ones(2, 6, 2, 5, device=meta)}, TypeError, f"{name} {ON_META}"
    yield {"b": ones(2, 6, 1, 5)}, ValueError, "c must be (B, L, G, N) = (2, 6, 1, 5), got (2, 6, 2, 5)"
    yield {"c": ones(2, 6, 2, 4)}, ValueError, "c must be (B, L, G, N) = (2, 6, 2, 5), got (2, 6, 2, 4)"
    three, none = ones(2, 6, 3, 5), ones(2, 6, 0, 5)
    dividing = "b must be (B, L, G, N) with G dividing H = 4, got"
    yield {"b": three, "c": three}, ValueError, f"{dividing} (2, 6, 3, 5)"
    yield {"b": none, "c": none}, ValueError, f"{dividing} (2, 6, 0, 5)"


@bad_calls(bad_arguments())
def test_bad_arguments(bad: Any) -> None:
    assert_refused(mamba_scan, GOOD, bad)


def bad_step_arguments() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    """Yield changes of GOOD_STEP that make a bad call."""
    ones, meta = torch.ones, torch.device("meta")
    yield from bad_parameters()
    yield {"state": None}, TypeError, f"state {TENSOR} NoneType"
    not_a_state = "state must be float16 or float32 or float64, got bfloat16"
    yield {"state": ones(2, 4, 3, 5).bfloat16()}, TypeError, not_a_state
    yield {"state": ones(4, 3, 5)}, ValueError, "state must be (B, H, P, N), got (4, 3, 5)"
    yield {"state": ones(2, 4, 5, 3)}, ValueError, "x must be (B, H, P) = (2, 4, 5), got (2, 4, 3)"
    yield {"state": ones(2, 4, 3, 6)}, ValueError, "b must be (B, G, N) = (2, G, 6), got (2, 2, 5)"
    yield {"state": ones(2, 4, 3, 5, device=meta)}, TypeError, "x must be on meta like the first tensor, got cpu"
    yield {"x": 1.0}, TypeError, f"x {TENSOR} float"
    yield {"x": ones(2, 4, 3).int()}, TypeError, f"x {FLOATS} int32"
    yield {"x": ones(2, 4, 3).half()}, TypeError, "b must be float16, got float32"
    yield {"x": ones(2, 1, 4, 3)}, ValueError, "x must be (B, H, P) = (2, 4, 3), got (2, 1, 4, 3)"
    yield {"x": ones(1, 4, 3)}, ValueError, "x must be (B, H, P) = (2, 4, 3), got (1, 4, 3)"
    yield {"x": ones(2, 3, 4).mT}, ValueError, "x must have stride 1 along P, got strides (12, 1, 4)"
    yield {"x": ones(2, 4, 3, device=meta)}, TypeError, f"x {ON_META}"
    yield {"dt": None}, TypeError, f"dt {TENSOR} NoneType"
    yield {"dt": ones(2, 4).bool()}, TypeError, f"dt {FLOATS} bool"
    yield {"dt": ones(2, 1, 4)}, ValueError, "dt must be (B, H) = (2, 4), got (2, 1, 4)"
    yield {"dt": ones(2, 4, device=meta)}, TypeError, f"dt {ON_META}"
    for name, good in (("b", "(2, G, 5)"), ("c", "(2, 2, 5)")):
        yield {name: 1.0}, TypeError, f"{name} {TENSOR} float"
        yield {name: ones(2, 2, 5).double()}, TypeError, f"{name} must be float32, got float64"
        yield {name: ones(2, 10)}, ValueError, f"{name} must be (B, G, N) = {good}, got (2, 10)"
        yield {name: ones(2, 2, 4)}, ValueError, f"{name} must be (B, G, N) = {good}, got (2, 2, 4)"
        yield {name: ones(2, 5, 2).mT}, ValueError, f"{name} must have stride 1 along N, got strides (10, 1, 2)"
        yield {name: ones(2, 2, 5, device=meta)}, TypeError, f"{name} {ON_META}"
    three = ones(2, 3, 5)
    yield {"b": three, "c": three}, ValueError, "b must be (B, G, N) with G dividing H = 4, got (2, 3, 5)"


@bad_calls(bad_step_arguments())
def test_bad_step_arguments(bad: Any) -> None:
    mamba_step(**GOOD_STEP | {"state": GOOD_STEP["state"].clone()})
    assert_refused(mamba_step, GOOD_STEP, bad)
