"""`mamba_scan` and `mamba_step`: against the sequential recurrence, float64, and autograd."""

import itertools
import random
import time
from collections.abc import Callable, Iterator
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
    converted,
    device_of,
    document_ids,
    outputs_and_gradients,
)
from torch.nn import functional as F

from yaongi.kernels import mamba_scan, mamba_step, use_backend
from yaongi.kernels.mamba_scan.reference import mamba_scan_backward_reference, mamba_scan_reference

DIFFERENTIABLE = ("x", "dt", "A", "b", "c", "D", "dt_bias", "initial_state")
OPTIONAL = ("D", "dt_bias", "initial_state")
SIZES = (2, 4, 3, 2, 5)  # B, H, P, G, N
CASES = {  # L, document lengths, absent arguments
    "usual": (13, None, ()),
    "two documents": (13, (5, 8), ()),
    "documents of one token": (6, (1, 1, 1, 3), ()),
    "last document of one token": (9, (8, 1), ()),
    "documents at chunk boundaries": (16, (4, 8, 4), ()),
    "one token": (1, None, ()),
    "no optional arguments": (11, None, OPTIONAL),
    "documents, no initial state": (11, (4, 7), ("initial_state",)),
    "no D": (7, None, ("D",)),
    "no dt_bias": (7, None, ("dt_bias",)),
}


def arguments(
    sizes: tuple[int, int, int, int, int],
    L: int,
    documents: tuple[int, ...] | None = None,
    absent: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, Any]:
    """Arguments of one call; x, b and c are slices of one wider tensor, as the convolution leaves them."""
    B, H, P, G, N = sizes
    wide = torch.promote_types(dtype, torch.float32)
    packed = torch.randn(B, L, H * P + 2 * G * N).to(device, dtype)
    x, b, c = packed.split([H * P, G * N, G * N], dim=-1)
    made = {
        "x": x.unflatten(-1, (H, P)),
        "dt": torch.randn(B, L, H).to(dtype),
        "A": -(2 * torch.rand(H)).exp().to(wide) / 2,
        "b": b.unflatten(-1, (G, N)),
        "c": c.unflatten(-1, (G, N)),
        "D": torch.randn(H).to(wide),
        "dt_bias": torch.randn(H).to(wide) - 1,
        "document_ids": document_ids(B, documents) if documents else None,
        "initial_state": torch.randn(B, H, P, N).to(wide),
    }
    tensors = {name: None if t is None or name in absent else t.to(device) for name, t in made.items()}
    return tensors | {"return_final_state": True}


def differentiable(args: dict[str, Any]) -> list[str]:
    """The arguments of a call that take a gradient."""
    return [name for name in DIFFERENTIABLE if args[name] is not None]


def mamba_scan_sequential(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_final_state: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence, token by token; differentiable by autograd."""
    batch, length, heads, head_dim = x.shape
    b, c = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (b, c))
    state = A.new_zeros(batch, heads, head_dim, b.shape[3]) if initial_state is None else initial_state
    delta = F.softplus(dt if dt_bias is None else dt + dt_bias, threshold=100.0)
    outputs = []
    for t in range(length):
        if document_ids is not None and t > 0:
            same = document_ids[:, t] == document_ids[:, t - 1]
            state = torch.where(same[:, None, None, None], state, 0)
        update = (delta[:, t, :, None] * x[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(2)
        state = torch.exp(delta[:, t] * A)[..., None, None] * state + update
        outputs.append((state * c[:, t].unsqueeze(2)).sum(-1))
    y = torch.stack(outputs, dim=1)
    return (y if D is None else y + D.unsqueeze(-1) * x), state


def positional(args: dict[str, Any]) -> list[Any]:
    """The tensors of a call in the order of the op's schema."""
    names = ("x", "dt", "A", "b", "c", "D", "dt_bias", "document_ids", "initial_state")
    return [args[name] for name in names]


@pytest.mark.parametrize("case", CASES)
def test_equals_the_recurrence(case: str) -> None:
    args = arguments(SIZES, *CASES[case])
    results, expected = (
        outputs_and_gradients(f, args, differentiable(args)) for f in (mamba_scan, mamba_scan_sequential)
    )
    for name, value in expected.items():
        assert_equal_to_float64(results[name], value, 1e-12, name)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 12, 13, 14, 64])
@pytest.mark.parametrize("case", ["usual", "two documents", "documents of one token", "documents at chunk boundaries"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_chunk_size_gives_the_recurrence(groups: int, case: str, chunk: int) -> None:
    B, H, P, _, N = SIZES
    args = arguments((B, H, P, groups, N), *CASES[case])
    expected = outputs_and_gradients(mamba_scan_sequential, args, DIFFERENTIABLE)
    tensors = positional(args)
    y, final_state = mamba_scan_reference(*tensors, True, chunk)
    waves = [torch.arange(t.numel(), dtype=torch.float64).cos().view(t.shape) for t in (y, final_state)]
    gradients = mamba_scan_backward_reference(*waves, *tensors, chunk)
    results = [y, final_state, *gradients]
    for result, (name, value) in zip(results, expected.items(), strict=True):
        assert_equal_to_float64(result, value, 1e-12, name)


@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 129])
def test_lengths_around_the_default_chunk(length: int) -> None:
    documents = (length // 2, length - length // 2) if length > 1 else None
    args = arguments((1, 2, 3, 1, 4), length, documents)
    results, expected = (outputs_and_gradients(f, args, DIFFERENTIABLE) for f in (mamba_scan, mamba_scan_sequential))
    for name, value in expected.items():
        assert_equal_to_float64(results[name], value, 1e-12, name)


def test_the_backward_formulas_equal_autograd_through_the_forward() -> None:
    args = arguments(SIZES, *CASES["two documents"])

    def forward(**a: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return mamba_scan_reference(*positional(a), True, 4)

    expected = outputs_and_gradients(forward, args, DIFFERENTIABLE)
    for name, value in outputs_and_gradients(mamba_scan, args, DIFFERENTIABLE).items():
        assert_equal_to_float64(value, expected[name], 1e-12, name)


def test_the_final_state_comes_only_when_asked_for() -> None:
    args = arguments(SIZES, *CASES["two documents"])
    y, final_state = mamba_scan(**args)
    assert final_state.shape == (2, 4, 3, 5)
    only = mamba_scan(**args | {"return_final_state": False})
    assert isinstance(only, torch.Tensor)
    assert torch.equal(only, y)


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_through_one_output(output: int) -> None:
    args = arguments(SIZES, *CASES["two documents"])
    args["b"] = args["b"].detach().requires_grad_()
    (got,) = torch.autograd.grad(mamba_scan(**args)[output].square().sum(), args["b"])
    (expected,) = torch.autograd.grad(mamba_scan_sequential(**args)[output].square().sum(), args["b"])
    assert_equal_to_float64(got, expected, 1e-12)


RULE_CASES = {
    "usual": ((2, 4, 16, 2, 16), 150),
    "documents": ((2, 4, 16, 1, 32), 150, (1, 40, 2, 100, 7)),
    "no optional arguments": ((1, 8, 16, 8, 16), 200, None, OPTIONAL),
    "one token": ((32, 16, 16, 2, 16), 1),  # many rows: the rule compares two largest errors, of few values by chance
    "flagship heads": ((1, 8, 64, 1, 128), 257, (200, 57)),
}


@pytest.mark.parametrize("backend", backends("triton", "cuda"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", RULE_CASES)
def test_float64_rule(case: str, dtype: torch.dtype, backend: str) -> None:
    args = arguments(*RULE_CASES[case], dtype=dtype, device=device_of(backend, "mamba_scan"))
    assert_rule(lambda a: outputs_and_gradients(mamba_scan, a, differentiable(a)), args, backend)


@pytest.mark.parametrize("backend", backends("triton", "cuda"))
def test_any_strides_along_batch_and_length(backend: str) -> None:
    args = arguments(*RULE_CASES["documents"], dtype=torch.float32, device=device_of(backend, "mamba_scan"))
    dense = {name: t.contiguous() if isinstance(t, torch.Tensor) else t for name, t in args.items()}
    swapped = dense | {name: dense[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("x", "dt", "b", "c")}
    expected = outputs_and_gradients(mamba_scan, dense, DIFFERENTIABLE)
    for variant in (args, swapped):
        for name, value in outputs_and_gradients(mamba_scan, variant, DIFFERENTIABLE).items():
            torch.testing.assert_close(value, expected[name], msg=name)
            assert value.is_contiguous() or name.startswith("d"), name


@pytest.mark.parametrize("backend", backends("triton", "cuda"))
def test_packed_documents_equal_documents_alone(backend: str) -> None:
    lengths = (7, 1, 70, 2, 30)
    sizes = (1, 4, 16, 2, 16)
    args = arguments(sizes, sum(lengths), lengths, dtype=torch.float32, device=device_of(backend, "mamba_scan"))
    packed = outputs_and_gradients(mamba_scan, args, DIFFERENTIABLE)

    def alone(**a: Any) -> tuple[torch.Tensor, torch.Tensor]:
        pieces = [a[name].split(lengths, dim=1) for name in ("x", "dt", "b", "c")]
        outputs = []
        for i, (x, dt, b, c) in enumerate(zip(*pieces, strict=True)):
            state = a["initial_state"] if i == 0 else None
            piece = {"x": x, "dt": dt, "b": b, "c": c, "initial_state": state, "document_ids": None}
            outputs.append(mamba_scan(**a | piece))
        return torch.cat([y for y, _ in outputs], dim=1), outputs[-1][1]

    for name, value in outputs_and_gradients(alone, args, DIFFERENTIABLE).items():
        assert_equal_to_float64(packed[name], value, 1e-5, name)


@pytest.mark.parametrize("cut", [1, 5, 64, 99])
def test_a_sequence_in_two_pieces(cut: int) -> None:
    args = arguments((2, 4, 3, 2, 5), 100, (70, 30))
    expected = outputs_and_gradients(mamba_scan, args, DIFFERENTIABLE)

    def in_pieces(**a: Any) -> tuple[torch.Tensor, torch.Tensor]:
        along = ("x", "dt", "b", "c", "document_ids")
        y, state = mamba_scan(**a | {name: a[name][:, :cut] for name in along})
        rest = {name: a[name][:, cut:] for name in along}
        starts_anew = (a["document_ids"][:, cut] != a["document_ids"][:, cut - 1])[:, None, None, None]
        z, end = mamba_scan(**a | rest | {"initial_state": torch.where(starts_anew, 0, state)})
        return torch.cat([y, z], dim=1), end

    for name, value in outputs_and_gradients(in_pieces, args, DIFFERENTIABLE).items():
        assert_equal_to_float64(value, expected[name], 1e-12, name)


@pytest.mark.parametrize("absent", [(), OPTIONAL])
def test_step_continues_a_prefix_exactly(absent: tuple[str, ...]) -> None:
    args = arguments(SIZES, 75, None, absent)
    whole, final_state = mamba_scan(**args)
    prefix = {name: args[name][:, :66] for name in ("x", "dt", "b", "c")}
    _, state = mamba_scan(**args | prefix)
    parameters = {name: args[name] for name in ("A", "D", "dt_bias")}
    for t in range(66, 75):
        token = {name: args[name][:, t] for name in ("x", "dt", "b", "c")}
        assert_equal_to_float64(mamba_step(state, **token, **parameters), whole[:, t], 1e-13)
    assert_equal_to_float64(state, final_state, 1e-13)


def one_step(a: dict[str, Any]) -> dict[str, torch.Tensor]:
    """y and the state after one step from the first token of a call's arguments."""
    token = {name: a[name][:, 0] for name in ("x", "dt", "b", "c")}
    parameters = {name: a[name] for name in ("A", "D", "dt_bias")}
    return {"y": mamba_step(a["initial_state"], **token, **parameters), "state": a["initial_state"]}


@pytest.mark.parametrize("backend", backends("triton", "cuda"))
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_step_float64_rule(dtype: torch.dtype, state_dtype: torch.dtype, backend: str) -> None:
    args = arguments((3, 8, 16, 2, 32), 1, dtype=dtype, device=device_of(backend, "mamba_step"))
    args["initial_state"] = args["initial_state"].to(state_dtype)
    assert_rule(one_step, args, backend)


def test_step_keeps_no_graph() -> None:
    args = arguments(SIZES, 1)
    args["D"].requires_grad_()
    results = one_step(args)
    assert not results["y"].requires_grad
    assert not results["state"].requires_grad


def underflowing(dt: torch.Tensor) -> torch.Tensor:
    """Values whose softplus is the smallest normal float32s, denormal, or zero."""
    values = torch.tensor([-80.0, -87.0, -88.0, -90.0, -100.0, -103.0, -104.0, -110.0], device=dt.device)
    return values[torch.arange(dt.numel(), device=dt.device) % 8].view(dt.shape).to(dt.dtype)


EXTREMES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "dt huge": lambda a: {"dt": torch.full_like(a["dt"], 1e4)},
    "dt huge now and then": lambda a: {"dt": torch.where(a["dt"] > 1, 1e4, a["dt"])},
    "dt tiny": lambda a: {"dt": torch.full_like(a["dt"], -200.0)},
    "dt underflows now and then": lambda a: {"dt": torch.where(a["dt"] > 1, underflowing(a["dt"]), a["dt"])},
    "dt underflows": lambda a: {"dt": underflowing(a["dt"]), "dt_bias": torch.zeros_like(a["dt_bias"])},
    "A near 0": lambda a: {"A": torch.full_like(a["A"], -1e-30)},
    "A zero": lambda a: {"A": torch.zeros_like(a["A"])},
    "A -100": lambda a: {"A": torch.full_like(a["A"], -100.0)},
    "A -100 and dt huge": lambda a: {"A": torch.full_like(a["A"], -100.0), "dt": torch.full_like(a["dt"], 1e6)},
    "zeros": lambda a: {n: torch.zeros_like(a[n]) for n in DIFFERENTIABLE},
    "x zero": lambda a: {"x": torch.zeros_like(a["x"])},
}


@pytest.mark.parametrize("backend", backends("triton", "cuda"))
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes_are_finite_and_right(extreme: str, backend: str) -> None:
    device = device_of(backend, "mamba_scan")
    args = arguments((2, 16, 16, 2, 16), 80, (30, 50), dtype=torch.float32, device=device)
    args |= EXTREMES[extreme](args)
    assert_rule(lambda a: outputs_and_gradients(mamba_scan, a, DIFFERENTIABLE), args, backend)


@pytest.mark.parametrize("backend", backends("triton", "cuda"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("extreme", ["dt underflows", "dt underflows now and then", "dt tiny", "A near 0", "A -100"])
def test_extremes_are_finite_in_every_dtype(extreme: str, dtype: torch.dtype, backend: str) -> None:
    """No NaN where a step size, a decay or a product of both underflows, and about the right gradients."""
    args = arguments((2, 4, 16, 2, 16), 80, (30, 50), dtype=dtype, device=device_of(backend, "mamba_scan"))
    args |= EXTREMES[extreme](args)
    with use_backend("reference"):
        exact = outputs_and_gradients(mamba_scan, converted(args, torch.Tensor.double), DIFFERENTIABLE)
    with use_backend(backend):
        results = outputs_and_gradients(mamba_scan, args, DIFFERENTIABLE)
    for name, value in results.items():
        assert value.isfinite().all(), name
        assert (value.double() - exact[name]).norm() <= 0.1 * exact[name].norm() + 1e-3, name


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes_equal_the_recurrence(extreme: str) -> None:
    args = arguments(SIZES, 40, (15, 25))
    args |= EXTREMES[extreme](args)
    results, expected = (outputs_and_gradients(f, args, DIFFERENTIABLE) for f in (mamba_scan, mamba_scan_sequential))
    for name, value in expected.items():
        assert_equal_to_float64(results[name], value, 1e-9, name)  # sums near −1e6 lose 1e-10 of float64


def test_long_decays_keep_small_differences() -> None:
    """One token decays by e^−100000; the decays after it are still right in float32."""
    args = arguments((1, 2, 8, 1, 8), 64, absent=OPTIONAL, dtype=torch.float32)
    args["dt"] = torch.full_like(args["dt"], -3.0)
    args["dt"][:, 5] = 1e5
    args["A"] = -torch.ones_like(args["A"])
    exact = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in args.items()}
    names = differentiable(args)
    expected = outputs_and_gradients(mamba_scan_sequential, exact, names)
    for name, value in outputs_and_gradients(mamba_scan, args, names).items():
        assert_equal_to_float64(value, expected[name], 1e-5, name)


@pytest.mark.parametrize("case", ["usual", "two documents", "no optional arguments"])
def test_gradcheck(case: str) -> None:
    _, documents, absent = CASES[case]
    args = arguments((1, 2, 2, 1, 2), 5, documents and (2, 3), absent)
    names = differentiable(args)
    inputs = [args[name].detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *t: mamba_scan(**args | dict(zip(names, t, strict=True))), inputs)


def test_gradients_of_any_subset() -> None:
    args = arguments(SIZES, *CASES["two documents"])
    everything = outputs_and_gradients(mamba_scan, args, DIFFERENTIABLE)
    for count in range(3):
        for wanted in itertools.combinations(DIFFERENTIABLE, count):
            for name, value in outputs_and_gradients(mamba_scan, args, wanted).items():
                assert torch.equal(value, everything[name]), name


def test_only_inputs_are_saved() -> None:
    args = arguments(SIZES, *CASES["two documents"])
    known = {t.untyped_storage().data_ptr() for t in args.values() if isinstance(t, torch.Tensor)}
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    args["dt"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mamba_scan(**args)
    assert len(saved) == 9
    assert set(saved) <= known


def test_a_second_derivative_is_refused() -> None:
    args = arguments(SIZES, *CASES["usual"])
    dt = args["dt"].requires_grad_()
    (ddt,) = torch.autograd.grad(mamba_scan(**args)[0].sum(), dt, create_graph=True)
    with pytest.raises(RuntimeError, match="mamba_scan_backward: there is no derivative of this op"):
        ddt.sum().backward()


@pytest.mark.parametrize("case", ["two documents", "no optional arguments"])
def test_opcheck(case: str) -> None:
    args = arguments(SIZES, *CASES[case], dtype=torch.float32)
    ops, plain = torch.ops.yaongi, positional(args)
    needing = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in plain]
    for wants_state in (False, True):
        torch.library.opcheck(ops.mamba_scan.default, (*needing, wants_state))
    y, final_state = ops.mamba_scan(*plain, True)
    torch.library.opcheck(ops.mamba_scan_backward.default, (y, final_state, *plain))
    torch.library.opcheck(ops.mamba_scan_backward.default, (y, None, *plain))
    x, dt, A, b, c, D, dt_bias, _, _ = plain
    token = (x[:, 0], dt[:, 0], A, b[:, 0], c[:, 0], D, dt_bias)
    torch.library.opcheck(ops.mamba_step.default, (final_state, *token))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str) -> None:
    args = arguments(SIZES, *CASES["two documents"], dtype=torch.float32)
    expected = outputs_and_gradients(mamba_scan, args, DIFFERENTIABLE)
    compiled = torch.compile(mamba_scan, fullgraph=True, backend=compiler)
    for name, value in outputs_and_gradients(compiled, args, DIFFERENTIABLE).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_compiled_step() -> None:
    args = arguments(SIZES, 1, dtype=torch.float32)
    copy = args | {"initial_state": args["initial_state"].clone()}
    expected = one_step(copy)
    for name, value in torch.compile(one_step, fullgraph=True, backend="aot_eager")(args).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    torch.testing.assert_close(args["initial_state"], copy["initial_state"])


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(0, 2),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    heads_a_group=st.integers(1, 3),
    P=st.integers(1, 4),
    G=st.integers(1, 3),
    N=st.integers(1, 4),
    absent=st.sets(st.sampled_from(OPTIONAL)),
    chunk=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_documents(
    B: int, lengths: list[int], heads_a_group: int, P: int, G: int, N: int, absent: set[str], chunk: int, seed: int
) -> None:
    torch.manual_seed(seed)
    documents = tuple(lengths) if B and len(lengths) > 1 else None
    args = arguments((B, G * heads_a_group, P, G, N), sum(lengths), documents, tuple(absent))
    names = differentiable(args)
    results, expected = (outputs_and_gradients(f, args, names) for f in (mamba_scan, mamba_scan_sequential))
    chunked = mamba_scan_reference(*positional(args), True, chunk)
    for name, value in expected.items():
        assert_equal_to_float64(results[name], value, 1e-11, name)
    assert_equal_to_float64(chunked[0], expected["output 0"], 1e-11)
    assert_equal_to_float64(chunked[1], expected["output 1"], 1e-11)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On one thread a timing doesn't depend on what else the machine does between two threads' barriers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_five_times_as_fast_as_the_recurrence() -> None:
    args = arguments((1, 8, 64, 1, 64), 1024, absent=("initial_state",), dtype=torch.float32)

    def seconds(function: Callable[..., Any]) -> float:
        start = time.perf_counter()
        outputs_and_gradients(function, args, differentiable(args))
        return time.perf_counter() - start

    seconds(mamba_scan)
    assert 5 * min(seconds(mamba_scan) for _ in range(5)) <= seconds(mamba_scan_sequential)


def assert_near(
    results: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], what: str
) -> None:
    """Asserts that each Frobenius error is at most 1 %, or where terms cancel thrice that of the plain computation."""
    for name, value in exact.items():
        error, allowed = (results[name].double() - value).norm(), (plain[name].double() - value).norm()
        assert error <= 1e-2 * value.norm() + 3 * allowed + 1e-6, (
            f"{what} {name}: error {error:.2e} of {value.norm():.2e}"
        )


def on_gpu(args: dict[str, Any], backend: Any, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Outputs and gradients of a backend, perhaps in another dtype."""
    args = converted(args, lambda t: t if dtype is None else t.to(dtype))
    with use_backend(backend):
        return outputs_and_gradients(mamba_scan, args, differentiable(args))


def check_on_gpu(args: dict[str, Any], what: str) -> None:
    """Triton's results beside the reference's, in float64 and as it is."""
    exact, plain = on_gpu(args, "reference", torch.float64), on_gpu(args, "reference")
    assert_near(on_gpu(args, "triton"), exact, plain, what)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "L"),
    [
        ((1, 2, 128, 1, 64), 65),
        ((2, 4, 64, 2, 256), 130),
        ((1, 3, 72, 1, 24), 63),
        ((1, 1, 64, 1, 128), 5000),
        ((1, 64, 64, 8, 128), 1),
    ],
)
def test_sizes_on_a_gpu(sizes: tuple[int, int, int, int, int], L: int) -> None:
    documents = (L // 3, 1, L - L // 3 - 1) if L > 1 else None
    args = arguments(sizes, L, documents, dtype=torch.bfloat16, device="cuda")
    check_on_gpu(args, f"{sizes} {L}")


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_slices_and_segments_change_nothing(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of all heads at once, of some, of one at a time; the sequence whole and in segments."""
    from yaongi.kernels.mamba_scan import triton_impl
    from yaongi.kernels.mamba_scan.states import triton_impl as states

    args = arguments((2, 8, 16, groups, 16), 1000, (300, 700), dtype=torch.bfloat16, device="cuda")
    for slots in (1, 64):
        monkeypatch.setattr(states, "SLOTS", slots)
        for bound in (1e9, 1e5, 1.0):
            monkeypatch.setattr(triton_impl, "STATES_BYTES", bound)
            check_on_gpu(args, f"{slots} {bound}")


@pytest.mark.gpu
def test_fuzz_on_a_gpu() -> None:
    """200 random shapes and layouts of documents."""
    generator = random.Random(0)
    for case in range(200):
        G, heads_a_group, B = generator.choice((1, 2, 3)), generator.choice((1, 2, 4)), generator.choice((1, 2, 5))
        L = generator.choice((1, 2, 31, 63, 64, 65, 127, 128, 129, 200, 511, 1000)) + generator.choice((0, 0, 7))
        cuts = sorted({0, L, *(generator.randrange(L) for _ in range(generator.choice((0, 1, 3, 20))))})
        lengths = tuple(b - a for a, b in itertools.pairwise(cuts))
        absent = OPTIONAL if case % 2 else ()
        torch.manual_seed(case)
        args = arguments((B, G * heads_a_group, 16, G, 32), L, lengths, absent, dtype=torch.bfloat16, device="cuda")
        check_on_gpu(args, f"case {case}, {args['x'].shape}")


@pytest.mark.gpu
def test_cuda_graph_and_side_stream() -> None:
    args = arguments((1, 4, 16, 2, 32), 200, (150, 50), dtype=torch.bfloat16, device="cuda")
    with use_backend("triton"):
        expected = outputs_and_gradients(mamba_scan, args, DIFFERENTIABLE)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for name, value in outputs_and_gradients(mamba_scan, args, DIFFERENTIABLE).items():
                assert torch.equal(value, expected[name]), name
        torch.cuda.synchronize()
        tensors = positional(args)
        y, final = torch.ops.yaongi.mamba_scan(*tensors, True)
        with torch.cuda.graph(graph):
            captured = (
                *torch.ops.yaongi.mamba_scan(*tensors, True),
                *torch.ops.yaongi.mamba_scan_backward(y, None, *tensors),
            )
        graph.replay()
        torch.cuda.synchronize()
        again = (y, final, *torch.ops.yaongi.mamba_scan_backward(y, None, *tensors))
        assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))


@pytest.mark.gpu
def test_a_million_tokens() -> None:
    """Offsets beyond 2^31 elements: the end of the row equals the same tokens behind the state before them."""
    L, cut, (H, P, N) = 1_000_000, 999_936, (40, 64, 16)
    args = arguments((1, H, P, 1, N), 128, absent=("initial_state",), dtype=torch.bfloat16, device="cuda")
    long = {
        name: args[name].repeat(1, L // 128 + 1, *[1] * (args[name].dim() - 2))[:, :L] for name in ("x", "dt", "b", "c")
    }
    assert long["x"].numel() > 2**31
    with use_backend("triton"), torch.no_grad():
        y, final = mamba_scan(**args | long)
        _, state = mamba_scan(**args | {name: t[:, :cut] for name, t in long.items()})
        rest = {name: t[:, cut:] for name, t in long.items()}
        z, end = mamba_scan(**args | rest | {"initial_state": state})
    pieces = {"y": z, "final": end}
    assert_near({"y": y[:, cut:], "final": final}, {n: t.double() for n, t in pieces.items()}, pieces, "last tokens")


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
    """Bad calls of checked mode."""
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
    """Bad calls of scan and step alike: H is 4."""
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
    """Bad calls beside GOOD in the keyword arguments."""
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
    yield {"precision": "fp8"}, ValueError, "precision must be 'bf16' (fp8 is not available yet), got 'fp8'"
    yield {"precision": "fp32"}, ValueError, "precision must be 'bf16' or 'fp8', got 'fp32'"
    yield {"precision": None}, ValueError, "precision must be 'bf16' or 'fp8', got None"


def bad_arguments() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    """Bad calls beside GOOD."""
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
    """Bad calls beside GOOD_STEP."""
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
