"""`attention_step`: one new token per row attends to a cache."""

from typing import Any

import pytest
import torch
from oracle import assert_equal_to_float64
from support import assert_refused, assert_rule, backends, bad_calls, checked_mode, device_of

from yaongi.kernels import attention_step, use_backend

Tensor = torch.Tensor


def arguments(
    H: int,
    J: int,
    D: int,
    S: int,
    places: list[int],
    padding: list[int],
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, Any]:
    """Return arguments of one call: each row has padding before its text."""
    B, place, s = len(places), torch.tensor(places), torch.arange(S)
    shapes = {"q": (H, D), "k": (J, D), "v": (J, D), "keys": (J, S, D), "values": (J, S, D)}
    made = {name: torch.randn(B, *shape).to(device, dtype) for name, shape in shapes.items()}
    visible = (s <= place[:, None]) & (s >= torch.tensor(padding)[:, None])
    return made | {"visible": visible.to(device), "place": place.to(device), "length": max(places) + 1}


def run(args: dict[str, Any]) -> dict[str, Tensor]:
    """Return all that a call returns and changes."""
    args = {name: t.clone() if isinstance(t, Tensor) else t for name, t in args.items()}
    return {"y": attention_step(**args), "keys": args["keys"], "values": args["values"]}


def test_equals_its_definition() -> None:
    args = arguments(6, 2, 5, 11, [7, 0, 3], [2, 0, 3])
    results = run(args)
    for b, place in enumerate(args["place"].tolist()):
        first = int(args["visible"][b].int().argmax())
        for h in range(6):
            keys, values = (torch.cat([args[c][b, h // 3, first:place], args[n][b, h // 3, None]])
                            for c, n in (("keys", "k"), ("values", "v")))  # fmt: skip
            wanted = (keys @ args["q"][b, h] * 5**-0.5).softmax(0) @ values
            assert_equal_to_float64(results["y"][b, h], wanted, 1e-13)
        for name, new in (("keys", "k"), ("values", "v")):
            assert torch.equal(results[name][b, :, place], args[new][b])
            results[name][b, :, place] = args[name][b, :, place]
    assert torch.equal(results["keys"], args["keys"])
    assert torch.equal(results["values"], args["values"])


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("H", "J", "D", "places"), [(32, 8, 64, [300, 0, 127, 128]), (4, 4, 40, [9]), (16, 1, 256, [70, 65])], ids=str
)
def test_follows_the_rule(H: int, J: int, D: int, places: list[int], dtype: torch.dtype, backend: str) -> None:
    padding = [place // 3 for place in places]
    args = arguments(H, J, D, max(places) + 20, places, padding, dtype, device_of(backend, "attention_step"))
    assert_rule(run, args, backend)


@pytest.mark.parametrize("backend", backends("triton"))
def test_a_row_does_not_depend_on_the_others(backend: str) -> None:
    """Nor, by the kernel, on what lies in places that it doesn't see; in torch 0 · NaN is NaN."""
    device = device_of(backend, "attention_step")
    args = arguments(8, 2, 32, 300, [40, 250], [3, 0], torch.bfloat16, device)
    shorter = {name: t[:1] if isinstance(t, Tensor) else 41 for name, t in args.items()}
    with use_backend(backend):  # type: ignore[arg-type]
        together, alone = run(args)["y"], run(shorter)["y"]
        args["keys"][1], args["values"][1] = torch.nan, torch.nan
        beside = run(args)["y"]
        if backend == "triton":
            assert torch.equal(alone, together[:1])
            args["keys"][0, :, :3] = args["values"][0, :, :3] = args["values"][0, :, 41:] = torch.nan
            beside = run(args)["y"]
    assert torch.equal(beside[0], together[0])
    assert beside[1].isnan().all()


def test_opcheck_and_no_gradient() -> None:
    args = arguments(4, 2, 8, 9, [5, 2], [0, 0], torch.float32)
    torch.library.opcheck(torch.ops.yaongi.attention_step.default, tuple(args.values()))
    args["q"].requires_grad_()
    assert not attention_step(**args).requires_grad


GOOD = arguments(4, 2, 8, 9, [5, 2], [0, 0], torch.float32)


@bad_calls(
    [
        ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
        ({"k": torch.ones(2, 3, 8)}, ValueError, "k must be (B, J, D) with J a divisor of 4 (H), got (2, 3, 8)"),
        ({"k": torch.ones(2, 2, 8).half()}, TypeError, "k must be float32, got float16"),
        ({"keys": torch.ones(2, 2, 9, 7)}, ValueError, "keys must be (B, J, S, D) = (2, 2, S, 8), got (2, 2, 9, 7)"),
        ({"visible": torch.ones(2, 9)}, TypeError, "visible must be bool, got float32"),
        ({"place": torch.ones(2).int()}, TypeError, "place must be int64, got int32"),
        ({"length": 10}, ValueError, "length must be 1 to 9 (S), got 10"),
        ({"length": 0}, ValueError, "length must be 1 to 9 (S), got 0"),
    ]
)  # fmt: skip
def test_bad_arguments(bad: Any) -> None:
    if "k" in bad.changes and bad.changes["k"].shape[1] == 3:
        bad.changes["v"] = bad.changes["k"]
    assert_refused(attention_step, GOOD, bad)


def test_checked_mode() -> None:
    bad = GOOD | {"q": torch.full((2, 4, 8), torch.inf)}
    with checked_mode(), pytest.raises(ValueError, match=r"^attention_step: q must be finite, got 64 non-finite"):
        attention_step(**bad)
