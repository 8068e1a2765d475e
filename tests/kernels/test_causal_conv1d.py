"""`causal_conv1d` and its step: against a loop over positions, float64, and autograd."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_equal_to_float64
from support import (
    assert_refused,
    assert_rule,
    backends,
    bad_calls,
    checked_mode,
    device_of,
    document_ids,
    outputs_and_gradients,
)
from torch.nn import functional as F

from yaongi.kernels import causal_conv1d, causal_conv1d_step

DIFFERENTIABLE = ("x", "weight", "bias", "initial_state")
CASES = {  # B, L, C, W, options
    "usual": (2, 13, 5, 4, {}),
    "two documents": (2, 13, 5, 4, {"documents": (5, 8)}),
    "documents of one token": (2, 5, 3, 4, {"documents": (1, 1, 1, 2)}),
    "last document of one token": (2, 6, 3, 3, {"documents": (5, 1)}),
    "one token": (2, 1, 3, 4, {}),
    "shorter than the window": (2, 2, 3, 4, {}),
    "shorter than the window, two documents": (2, 2, 3, 4, {"documents": (1, 1)}),
    "no activation": (2, 7, 3, 4, {"activation": None, "documents": (3, 4)}),
    "no bias": (2, 7, 3, 4, {"bias": False}),
    "no initial state": (2, 7, 3, 4, {"initial_state": False, "documents": (2, 5)}),
    "no batch": (0, 7, 3, 4, {}),
    "window of 1": (2, 7, 3, 1, {}),
    "window of 2": (2, 7, 3, 2, {"documents": (2, 5)}),
    "window of 6": (2, 9, 3, 6, {"documents": (2, 7)}),
}


def arguments(
    B: int, L: int, C: int, W: int, options: dict[str, Any], dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> dict[str, Any]:
    """Return arguments of one call, with x a slice; `options` may drop optional ones or set document lengths."""
    lengths = options.get("documents")
    made = {
        "x": torch.randn(B, L, C + 24).to(device, dtype)[..., 8 : C + 8],
        "weight": torch.randn(C, W).to(dtype),
        "bias": torch.randn(C).to(dtype) if options.get("bias", True) else None,
        "initial_state": torch.randn(B, C, W - 1).to(dtype) if options.get("initial_state", True) else None,
        "document_ids": document_ids(B, lengths) if lengths else None,
    }
    tensors = {name: None if t is None else t.to(device) for name, t in made.items()}
    return tensors | {"activation": options.get("activation", "silu"), "return_final_state": True}


def differentiable(args: dict[str, Any]) -> list[str]:
    """Return the names of a call's arguments that get a gradient."""
    return [name for name in DIFFERENTIABLE if args[name] is not None]


def position_loop(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    activation: str | None,
    return_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the definition position by position, with the window as a queue; differentiable by autograd."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    queue = x.new_zeros(batch, channels, width - 1) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        if document_ids is not None and t > 0:
            same = document_ids[:, t] == document_ids[:, t - 1]
            queue = torch.where(same[:, None, None], queue, 0)
        window = torch.cat([queue, x[:, t, :, None]], dim=-1)
        queue = window[..., 1:]
        outputs.append((window * weight).sum(-1) + (0 if bias is None else bias))
    y = torch.stack(outputs, dim=1)
    return F.silu(y) if activation else y, queue


@pytest.mark.parametrize("case", CASES)
def test_equals_the_position_loop(case: str) -> None:
    args = arguments(*CASES[case])
    results, expected = (outputs_and_gradients(f, args, differentiable(args)) for f in (causal_conv1d, position_loop))
    for name, value in expected.items():
        assert_equal_to_float64(results[name], value, 1e-13, name)


def test_the_final_state_comes_only_when_asked_for() -> None:
    args = arguments(*CASES["two documents"])
    y, final_state = causal_conv1d(**args)
    assert final_state.shape == (2, 5, 3)
    only = causal_conv1d(**args | {"return_final_state": False})
    assert isinstance(only, torch.Tensor)
    assert torch.equal(only, y)


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_through_one_output(output: int) -> None:
    args = arguments(*CASES["two documents"])
    args["x"].requires_grad_()
    (got,) = torch.autograd.grad(causal_conv1d(**args)[output].square().sum(), args["x"])
    (expected,) = torch.autograd.grad(position_loop(**args)[output].square().sum(), args["x"])
    assert_equal_to_float64(got, expected, 1e-13)


RULE_CASES = {
    "usual": (2, 150, 72, 4, {}),
    "documents": (2, 150, 72, 4, {"documents": (1, 40, 2, 100, 7)}),
    "odd channels": (1, 37, 33, 4, {"documents": (36, 1)}),
    "no state, no bias": (3, 64, 64, 4, {"initial_state": False, "bias": False}),
    "no activation": (2, 70, 16, 3, {"activation": None, "documents": (35, 35)}),
    "window of 2": (2, 65, 16, 2, {}),
    "one token": (4, 1, 16, 4, {}),
    "two tokens, two documents": (4, 2, 16, 4, {"documents": (1, 1)}),
}


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", RULE_CASES)
def test_float64_rule(case: str, dtype: torch.dtype, backend: str) -> None:
    args = arguments(*RULE_CASES[case], dtype, device_of(backend, "causal_conv1d"))
    assert_rule(lambda a: outputs_and_gradients(causal_conv1d, a, differentiable(a)), args, backend)


@pytest.mark.parametrize("backend", backends("triton"))
def test_parameters_in_float32_beside_bfloat16(backend: str) -> None:
    args = arguments(*RULE_CASES["documents"], torch.bfloat16, device_of(backend, "causal_conv1d"))
    args |= {"weight": args["weight"].float(), "bias": args["bias"].float()}
    assert_rule(lambda a: outputs_and_gradients(causal_conv1d, a, differentiable(a)), args, backend)


@pytest.mark.parametrize("backend", backends("triton"))
def test_any_strides_along_batch_and_length(backend: str) -> None:
    args = arguments(*RULE_CASES["documents"], torch.float32, device_of(backend, "causal_conv1d"))
    batch_inside = {**args, "x": args["x"].transpose(0, 1).contiguous().transpose(0, 1)}
    contiguous = {**args, "x": args["x"].contiguous()}
    strided_weight = {**contiguous, "weight": args["weight"].mT.contiguous().mT}
    expected = outputs_and_gradients(causal_conv1d, contiguous, DIFFERENTIABLE)
    for variant in (args, batch_inside, strided_weight):
        for name, value in outputs_and_gradients(causal_conv1d, variant, DIFFERENTIABLE).items():
            torch.testing.assert_close(value, expected[name], msg=name)
            assert name != "output 0" or value.is_contiguous()


@pytest.mark.parametrize("backend", backends("triton"))
def test_an_expanded_gradient(backend: str) -> None:
    args = arguments(*RULE_CASES["usual"], torch.float32, device_of(backend, "causal_conv1d"))
    x = args["x"].requires_grad_()
    y, _ = causal_conv1d(**args)
    (expanded,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (dense,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("backend", backends("triton"))
def test_packed_documents_equal_documents_alone(backend: str) -> None:
    device = device_of(backend, "causal_conv1d")
    args = arguments(1, 20, 8, 4, {"documents": (7, 1, 2, 10)}, torch.float32, device)
    y, final_state = causal_conv1d(**args)
    pieces = args["x"].split((7, 1, 2, 10), dim=1)
    states = [args["initial_state"], None, None, None]
    alone = [
        causal_conv1d(**args | {"x": piece, "initial_state": state, "document_ids": None})
        for piece, state in zip(pieces, states, strict=True)
    ]
    torch.testing.assert_close(y, torch.cat([piece for piece, _ in alone], dim=1), rtol=0, atol=1e-6)
    assert torch.equal(final_state, alone[-1][1])


@pytest.mark.parametrize("backend", backends("triton"))
def test_nothing_leaks_over_a_boundary_not_even_nan(backend: str) -> None:
    device = device_of(backend, "causal_conv1d")
    args = arguments(2, 12, 8, 4, {"documents": (6, 6)}, torch.float32, device)
    clean, _ = causal_conv1d(**args)
    args["x"][:, 5] = torch.nan
    spoiled, final_state = causal_conv1d(**args)
    assert torch.equal(spoiled[:, 6:], clean[:, 6:])
    assert final_state.isfinite().all()


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("cut", [1, 2, 3, 8])
def test_a_sequence_in_two_pieces(cut: int, backend: str) -> None:
    args = arguments(2, 9, 16, 4, {}, torch.bfloat16, device_of(backend, "causal_conv1d"))
    whole, final_state = causal_conv1d(**args)
    first, state = causal_conv1d(**args | {"x": args["x"][:, :cut]})
    second, end = causal_conv1d(**args | {"x": args["x"][:, cut:], "initial_state": state})
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    assert torch.equal(end, final_state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_step_continues_a_prefix_exactly(activation: str | None, width: int, dtype: torch.dtype) -> None:
    args = arguments(2, 9, 5, width, {"activation": activation}, dtype)
    whole, final_state = causal_conv1d(**args)
    _, state = causal_conv1d(**args | {"x": args["x"][:, :4]})
    filters = {name: args[name] for name in ("weight", "bias", "activation")}
    for t in range(4, 9):
        y = causal_conv1d_step(args["x"][:, t], state, **filters)
        torch.testing.assert_close(y, whole[:, t])
    assert torch.equal(state, final_state)


@pytest.mark.parametrize("backend", backends("triton"))
def test_steps_take_turns(backend: str) -> None:
    """A row's step touches only its own convolution of the three, exactly as a step of that one alone."""
    args = arguments(3, 4, 16, 4, {}, torch.bfloat16, device_of(backend, "causal_conv1d_step"))
    (x, weight), device = (args["x"], args["weight"]), args["x"].device
    state = torch.randn(3, 3, 16, 3).to(x)
    alone, steps = state.clone(), torch.tensor([5, 0, -1], device=device)
    for t in range(4):
        y = causal_conv1d_step(x[:, t], state, weight, steps=steps)
        for row, step in enumerate((5 + t, t, t - 1)):
            own = alone[row : row + 1, step % 3]
            assert torch.equal(y[row : row + 1], causal_conv1d_step(x[row : row + 1, t], own, weight))
        assert torch.equal(state, alone)
        steps += 1


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("channels", [7, 1000])
def test_step_follows_the_rule_and_keeps_no_graph(channels: int, width: int, backend: str) -> None:
    args = arguments(3, 1, channels, width, {}, torch.bfloat16, device_of(backend, "causal_conv1d_step"))

    def run(a: dict[str, Any]) -> dict[str, torch.Tensor]:
        state = a["initial_state"].clone()
        y = causal_conv1d_step(a["x"][:, 0], state, a["weight"].requires_grad_(), a["bias"])
        return {"y": y, "state": state}

    assert_rule(run, args, backend)
    assert not run(args)["y"].requires_grad
    assert not args["initial_state"].requires_grad


@pytest.mark.parametrize("case", ["two documents", "no initial state", "window of 1"])
def test_gradcheck(case: str) -> None:
    B, _, _, W, options = CASES[case]
    args = arguments(B, 7, 2, W, {**options, "documents": (2, 5)})
    names = differentiable(args)
    inputs = [args[name].detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d(**args | dict(zip(names, t, strict=True))), inputs)


@pytest.mark.parametrize("backend", backends("triton"))
def test_gradients_of_any_subset(backend: str) -> None:
    args = arguments(*RULE_CASES["documents"], torch.float32, device_of(backend, "causal_conv1d"))
    everything = outputs_and_gradients(causal_conv1d, args, DIFFERENTIABLE)
    for count in range(4):
        for wanted in itertools.combinations(DIFFERENTIABLE, count):
            for name, value in outputs_and_gradients(causal_conv1d, args, wanted).items():
                assert torch.equal(value, everything[name]), name


def test_a_second_derivative_is_refused() -> None:
    args = arguments(*CASES["usual"])
    x = args["x"].requires_grad_()
    (dx,) = torch.autograd.grad(causal_conv1d(**args)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d_backward: there is no derivative of this op"):
        dx.sum().backward()


@pytest.mark.parametrize("case", ["two documents", "no bias", "no initial state", "window of 1"])
def test_opcheck(case: str) -> None:
    args = arguments(*CASES[case])
    for name in differentiable(args):
        args[name].requires_grad_()
    tensors = [args[name] for name in ("x", "weight", "bias", "document_ids", "initial_state")]
    ops = torch.ops.yaongi
    for wants_state in (False, True):
        torch.library.opcheck(ops.causal_conv1d.default, (*tensors, "silu", wants_state))
    plain = [None if t is None else t.detach() for t in tensors]
    y, final_state = ops.causal_conv1d(*plain, "silu", True)
    torch.library.opcheck(ops.causal_conv1d_backward.default, (y, final_state, *plain, "silu"))
    torch.library.opcheck(ops.causal_conv1d_backward.default, (y, None, *plain, None))
    x, weight, bias = plain[:3]
    torch.library.opcheck(ops.causal_conv1d_step.default, (x[:, 0], final_state, weight, bias, "silu", None))
    turns = torch.stack([final_state, final_state], dim=1), weight, None, "silu", torch.tensor([3, 0])
    torch.library.opcheck(ops.causal_conv1d_step.default, (x[:, 0], *turns))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str) -> None:
    args = arguments(*CASES["two documents"], torch.float32)
    expected = outputs_and_gradients(causal_conv1d, args, DIFFERENTIABLE)
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend=compiler)
    for name, value in outputs_and_gradients(compiled, args, DIFFERENTIABLE).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_compiled_step() -> None:
    args = arguments(*CASES["one token"], torch.float32)
    states = [args["initial_state"].clone() for _ in range(2)]
    results = [
        step(args["x"][:, 0], state, args["weight"], args["bias"])
        for step, state in zip(
            (causal_conv1d_step, torch.compile(causal_conv1d_step, fullgraph=True, backend="aot_eager")),
            states,
            strict=True,
        )
    ]
    assert torch.equal(*results)
    assert torch.equal(*states)
    assert not torch.equal(states[0], args["initial_state"])


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(0, 3),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    C=st.integers(1, 4),
    W=st.integers(1, 5),
    bias=st.booleans(),
    initial_state=st.booleans(),
    activation=st.sampled_from(["silu", None]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_documents(
    B: int, lengths: list[int], C: int, W: int, bias: bool, initial_state: bool, activation: str | None, seed: int
) -> None:
    torch.manual_seed(seed)
    options = {"bias": bias, "initial_state": initial_state, "activation": activation}
    if B and len(lengths) > 1:
        options["documents"] = tuple(lengths)
    args = arguments(B, sum(lengths), C, W, options)
    results, expected = (outputs_and_gradients(f, args, differentiable(args)) for f in (causal_conv1d, position_loop))
    for name, value in expected.items():
        assert_equal_to_float64(results[name], value, 1e-12, name)


GOOD = arguments(2, 5, 3, 4, {"documents": (2, 3)}, torch.float32)  # B 2, L 5, C 3, W 4
GOOD_STEP = {
    "x": torch.ones(2, 3),
    "state": torch.ones(2, 3, 3),
    "weight": torch.ones(3, 4),
    "bias": torch.ones(3),
    "activation": "silu",
}
FLOATS = "must be float16 or bfloat16 or float32 or float64, got"
TENSOR = "must be a tensor, got"
ON_META = "must be on cpu like the first tensor, got meta"


@bad_calls(
    [
        ({"x": torch.full((2, 5, 3), torch.nan)}, ValueError, "x must be finite, got 30 non-finite values"),
        ({"weight": torch.full((3, 4), torch.inf)}, ValueError, "weight must be finite, got 12 non-finite values"),
        ({"bias": torch.full((3,), torch.nan)}, ValueError, "bias must be finite, got 3 non-finite values"),
        (
            {"initial_state": torch.full((2, 3, 3), -torch.inf)},
            ValueError,
            "initial_state must be finite, got 18 non-finite values",
        ),
        (
            {"document_ids": torch.tensor([[0, 0, 1, 1, 1], [2, 2, 1, 1, 1]]).int()},
            ValueError,
            "document_ids must be non-decreasing along L, got a decreasing pair",
        ),
    ]
)
def test_checked_mode(bad: Any) -> None:
    with checked_mode():
        causal_conv1d(**GOOD)
        assert_refused(causal_conv1d, GOOD, bad)
    causal_conv1d(**GOOD | bad.changes)


@bad_calls(
    [
        (
            {name: torch.full(GOOD_STEP[name].shape, torch.nan)},
            ValueError,
            f"{name} must be finite, got {n} non-finite values",
        )
        for name, n in (("x", 6), ("state", 18), ("weight", 12), ("bias", 3))
    ]
)
def test_checked_mode_of_the_step(bad: Any) -> None:
    with checked_mode():
        assert_refused(causal_conv1d_step, GOOD_STEP, bad)


def bad_options() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    """Yield changes of GOOD's keyword arguments that make a bad call."""
    ids, ones, meta = GOOD["document_ids"], torch.ones, torch.device("meta")
    yield {"activation": "relu"}, ValueError, "activation must be 'silu' or None, got 'relu'"
    yield {"activation": True}, ValueError, "activation must be 'silu' or None, got True"
    yield {"document_ids": ids.tolist()}, TypeError, f"document_ids {TENSOR} list"
    yield {"document_ids": ids.long()}, TypeError, "document_ids must be int32, got int64"
    yield {"document_ids": ids.float()}, TypeError, "document_ids must be int32, got float32"
    yield {"document_ids": ids[0]}, ValueError, "document_ids must be (B, L) = (2, 5), got (5,)"
    yield {"document_ids": ids[:, 1:]}, ValueError, "document_ids must be (B, L) = (2, 5), got (2, 4)"
    yield {"document_ids": ids.to(meta)}, TypeError, f"document_ids {ON_META}"
    yield {"initial_state": "zeros"}, TypeError, f"initial_state {TENSOR} str"
    yield {"initial_state": ones(2, 3, 3).half()}, TypeError, "initial_state must be float32, got float16"
    yield {"initial_state": ones(2, 3, 4)}, ValueError, "initial_state must be (B, C, W-1) = (2, 3, 3), got (2, 3, 4)"
    yield {"initial_state": ones(3, 3)}, ValueError, "initial_state must be (B, C, W-1) = (2, 3, 3), got (3, 3)"
    yield {"initial_state": ones(2, 3, 3, device=meta)}, TypeError, f"initial_state {ON_META}"
    yield {"return_final_state": None}, TypeError, "return_final_state must be a bool, got NoneType"
    yield {"return_final_state": 1}, TypeError, "return_final_state must be a bool, got int"


def bad_arguments() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    """Yield changes of GOOD that make a bad call."""
    ones, meta = torch.ones, torch.device("meta")
    yield from bad_options()
    yield {"x": None}, TypeError, f"x {TENSOR} NoneType"
    yield {"x": [[[1.0]]]}, TypeError, f"x {TENSOR} list"
    yield {"x": ones(2, 5, 3).int()}, TypeError, f"x {FLOATS} int32"
    yield {"x": ones(2, 5, 3, dtype=torch.complex64)}, TypeError, f"x {FLOATS} complex64"
    yield {"x": ones(2, 5, 3).double()}, TypeError, "initial_state must be float64, got float32"
    yield {"x": ones(5, 3)}, ValueError, "x must be (B, L, C), got (5, 3)"
    yield {"x": ones(1, 2, 5, 3)}, ValueError, "x must be (B, L, C), got (1, 2, 5, 3)"
    yield {"x": ones(2, 0, 3)}, ValueError, "x must be (B, L, C) with L >= 1, got (2, 0, 3)"
    yield {"x": ones(2, 5, 4)}, ValueError, "weight must be (C, W) = (4, W), got (3, 4)"
    yield {"x": ones(2, 6, 3)}, ValueError, "document_ids must be (B, L) = (2, 6), got (2, 5)"
    yield {"x": ones(1, 5, 3)}, ValueError, "document_ids must be (B, L) = (1, 5), got (2, 5)"
    yield {"x": ones(2, 3, 5).mT}, ValueError, "x must have stride 1 along C, got strides (15, 1, 5)"
    yield {"x": ones(2, 5, 3, device=meta)}, TypeError, "weight must be on meta like the first tensor, got cpu"
    yield {"weight": 1.0}, TypeError, f"weight {TENSOR} float"
    yield {"weight": None}, TypeError, f"weight {TENSOR} NoneType"
    yield {"weight": ones(3, 4).long()}, TypeError, f"weight {FLOATS} int64"
    yield {"weight": ones(3, 4).half()}, TypeError, "bias must be float16, got float32"
    yield {"weight": ones(3)}, ValueError, "weight must be (C, W) = (3, W), got (3,)"
    yield {"weight": ones(3, 1, 4)}, ValueError, "weight must be (C, W) = (3, W), got (3, 1, 4)"
    yield {"weight": ones(4, 3)}, ValueError, "weight must be (C, W) = (3, W), got (4, 3)"
    yield {"weight": ones(3, 0)}, ValueError, "weight must be (C, W) with W >= 1, got (3, 0)"
    yield {"weight": ones(3, 3)}, ValueError, "initial_state must be (B, C, W-1) = (2, 3, 2), got (2, 3, 3)"
    yield {"weight": ones(3, 4, device=meta)}, TypeError, f"weight {ON_META}"
    yield {"bias": 0.0}, TypeError, f"bias {TENSOR} float"
    yield {"bias": ones(3).bool()}, TypeError, "bias must be float32, got bool"
    yield {"bias": ones(3).double()}, TypeError, "bias must be float32, got float64"
    yield {"bias": ones(4)}, ValueError, "bias must be (C) = (3), got (4,)"
    yield {"bias": ones(1, 3)}, ValueError, "bias must be (C) = (3), got (1, 3)"
    yield {"bias": ones(3, device=meta)}, TypeError, f"bias {ON_META}"


@bad_calls(bad_arguments())
def test_bad_arguments(bad: Any) -> None:
    causal_conv1d(**GOOD)
    assert_refused(causal_conv1d, GOOD, bad)


def bad_step_arguments() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    """Yield changes of GOOD_STEP that make a bad call."""
    ones, meta = torch.ones, torch.device("meta")
    yield {"x": 3}, TypeError, f"x {TENSOR} int"
    yield {"x": ones(2, 3).int()}, TypeError, f"x {FLOATS} int32"
    yield {"x": ones(2, 3).half()}, TypeError, "state must be float16, got float32"
    yield {"x": ones(2, 1, 3)}, ValueError, "x must be (B, C), got (2, 1, 3)"
    yield {"x": ones(2, 4)}, ValueError, "weight must be (C, W) = (4, W), got (3, 4)"
    yield {"x": ones(3, 2).mT}, ValueError, "x must have stride 1 along C, got strides (1, 2)"
    yield {"x": ones(2, 3, device=meta)}, TypeError, "weight must be on meta like the first tensor, got cpu"
    yield {"state": None}, TypeError, f"state {TENSOR} NoneType"
    yield {"state": ones(2, 3, 3).double()}, TypeError, "state must be float32, got float64"
    yield {"state": ones(2, 3)}, ValueError, "state must be (B, C, W-1) = (2, 3, 3), got (2, 3)"
    yield {"state": ones(2, 3, 4)}, ValueError, "state must be (B, C, W-1) = (2, 3, 3), got (2, 3, 4)"
    yield {"state": ones(1, 3, 3)}, ValueError, "state must be (B, C, W-1) = (2, 3, 3), got (1, 3, 3)"
    yield {"state": ones(2, 3, 3, device=meta)}, TypeError, f"state {ON_META}"
    yield {"weight": [1.0]}, TypeError, f"weight {TENSOR} list"
    yield {"weight": ones(3, 4).bool()}, TypeError, f"weight {FLOATS} bool"
    yield {"weight": ones(3, 1, 4)}, ValueError, "weight must be (C, W) = (3, W), got (3, 1, 4)"
    yield {"weight": ones(3, 0)}, ValueError, "weight must be (C, W) with W >= 1, got (3, 0)"
    yield {"weight": ones(3, 3)}, ValueError, "state must be (B, C, W-1) = (2, 3, 2), got (2, 3, 3)"
    yield {"bias": 1}, TypeError, f"bias {TENSOR} int"
    yield {"bias": ones(3).half()}, TypeError, "bias must be float32, got float16"
    yield {"bias": ones(2)}, ValueError, "bias must be (C) = (3), got (2,)"
    yield {"bias": ones(3, device=meta)}, TypeError, f"bias {ON_META}"
    yield {"activation": "gelu"}, ValueError, "activation must be 'silu' or None, got 'gelu'"
    steps, phases = torch.zeros(2, dtype=torch.int64), ones(2, 2, 3, 3)
    yield {"steps": steps}, ValueError, "state must be (B, P, C, W-1) = (2, P, 3, 3), got (2, 3, 3)"
    empty = {"steps": steps, "state": ones(2, 0, 3, 3)}
    yield empty, ValueError, "state must be (B, P, C, W-1) with P >= 1, got (2, 0, 3, 3)"
    yield {"steps": steps.int(), "state": phases}, TypeError, "steps must be int64, got int32"
    yield {"steps": steps[:1], "state": phases}, ValueError, "steps must be (B) = (2), got (1,)"


@bad_calls(bad_step_arguments())
def test_bad_step_arguments(bad: Any) -> None:
    causal_conv1d_step(**GOOD_STEP | {"state": GOOD_STEP["state"].clone()})
    assert_refused(causal_conv1d_step, GOOD_STEP, bad)
