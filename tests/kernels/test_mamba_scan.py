"""`mamba_scan`: against the sequential recurrence, float64, and autograd."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mamba_support import DIFFERENTIABLE, OPTIONAL, SIZES, arguments, differentiable, mamba_scan_sequential, positional
from oracle import assert_equal_to_float64
from support import assert_rule, backends, converted, device_of, outputs_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from yaongi.kernels import mamba_scan, use_backend
from yaongi.kernels.mamba_scan.reference import mamba_scan_backward_reference, mamba_scan_reference

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


@pytest.mark.parametrize("length", [1, 7, 15, 16, 17, 33, 63, 64, 65, 129])
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
    "one token": ((32, 16, 16, 2, 16), 1),  # many rows, since the largest errors of few values vary by chance
    "flagship heads": ((1, 8, 64, 1, 128), 257, (200, 57)),
}


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", RULE_CASES)
def test_float64_rule(case: str, dtype: torch.dtype, backend: str) -> None:
    args = arguments(*RULE_CASES[case], dtype=dtype, device=device_of(backend, "mamba_scan"))
    assert_rule(lambda a: outputs_and_gradients(mamba_scan, a, differentiable(a)), args, backend)


@pytest.mark.parametrize("backend", backends("triton"))
def test_any_strides_along_batch_and_length(backend: str) -> None:
    args = arguments(*RULE_CASES["documents"], dtype=torch.float32, device=device_of(backend, "mamba_scan"))
    dense = {name: t.contiguous() if isinstance(t, torch.Tensor) else t for name, t in args.items()}
    swapped = dense | {name: dense[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("x", "dt", "b", "c")}
    expected = outputs_and_gradients(mamba_scan, dense, DIFFERENTIABLE)
    for variant in (args, swapped):
        for name, value in outputs_and_gradients(mamba_scan, variant, DIFFERENTIABLE).items():
            torch.testing.assert_close(value, expected[name], msg=name)
            assert value.is_contiguous() or name.startswith("d"), name


@pytest.mark.parametrize("backend", backends("triton"))
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


def underflowing(dt: torch.Tensor) -> torch.Tensor:
    """Return values whose softplus is among the smallest normal float32s, denormal, or zero."""
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


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes_are_finite_and_right(extreme: str, backend: str) -> None:
    device = device_of(backend, "mamba_scan")
    args = arguments((2, 16, 16, 2, 16), 80, (30, 50), dtype=torch.float32, device=device)
    args |= EXTREMES[extreme](args)
    assert_rule(lambda a: outputs_and_gradients(mamba_scan, a, DIFFERENTIABLE), args, backend)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("extreme", ["dt underflows", "dt underflows now and then", "dt tiny", "A near 0", "A -100"])
def test_extremes_are_finite_in_every_dtype(extreme: str, dtype: torch.dtype, backend: str) -> None:
    """Where a step size, a decay or their product underflows, there is no NaN, and gradients are about right."""
    args = arguments((2, 4, 16, 2, 16), 80, (30, 50), dtype=dtype, device=device_of(backend, "mamba_scan"))
    args |= EXTREMES[extreme](args)
    with use_backend("reference"):
        exact = outputs_and_gradients(mamba_scan, converted(args, torch.Tensor.double), DIFFERENTIABLE)
    with use_backend(backend):
        results = outputs_and_gradients(mamba_scan, args, DIFFERENTIABLE)
    for name, value in results.items():
        assert value.isfinite().all(), name
        error, scale = (value.double() - exact[name]).norm(), exact[name].norm()
        allowed = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 1e-3}[dtype] * scale + 1e-6
        assert error <= allowed, f"{name}: error {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes_equal_the_recurrence(extreme: str) -> None:
    args = arguments(SIZES, 40, (15, 25))
    args |= EXTREMES[extreme](args)
    results, expected = (outputs_and_gradients(f, args, DIFFERENTIABLE) for f in (mamba_scan, mamba_scan_sequential))
    for name, value in expected.items():
        assert_equal_to_float64(results[name], value, 1e-9, name)  # sums near −1e6 lose 1e-10 of float64


def test_long_decays_keep_small_differences() -> None:
    """After one token with a decay of e^−100000, the later decays are still right in float32."""
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


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(0, 2),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    heads_per_group=st.integers(1, 3),
    P=st.integers(1, 4),
    G=st.integers(1, 3),
    N=st.integers(1, 4),
    absent=st.sets(st.sampled_from(OPTIONAL)),
    chunk=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_documents(
    B: int, lengths: list[int], heads_per_group: int, P: int, G: int, N: int, absent: set[str], chunk: int, seed: int
) -> None:
    torch.manual_seed(seed)
    documents = tuple(lengths) if B and len(lengths) > 1 else None
    args = arguments((B, G * heads_per_group, P, G, N), sum(lengths), documents, tuple(absent))
    names = differentiable(args)
    results, expected = (outputs_and_gradients(f, args, names) for f in (mamba_scan, mamba_scan_sequential))
    chunked = mamba_scan_reference(*positional(args), True, chunk)
    for name, value in expected.items():
        assert_equal_to_float64(results[name], value, 1e-11, name)
    assert_equal_to_float64(chunked[0], expected["output 0"], 1e-11)
    assert_equal_to_float64(chunked[1], expected["output 1"], 1e-11)


def test_the_reference_works_on_whole_chunks() -> None:
    """The number of torch's operations grows with the chunks, not with the tokens."""
    args = arguments((1, 8, 64, 1, 64), 1024, absent=("initial_state",), dtype=torch.float32)
    with Operations() as operations:
        outputs_and_gradients(mamba_scan, args, differentiable(args))
    assert operations.count < 512  # 16 chunks


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_references_look_at_no_value_off_a_cpu() -> None:
    """There the host would wait, and a recording would end; the meta device has none to look at."""
    tensors = [t.to("meta") for t in positional(arguments(SIZES, *CASES["two documents"]))]
    results = mamba_scan_reference(*tensors, True)
    gradients = mamba_scan_backward_reference(*results, *tensors)
    assert [t.shape for t in results] == [tensors[0].shape, tensors[-1].shape]
    inputs = [t for t in tensors if t.is_floating_point()]
    assert [t.shape for t in gradients] == [t.shape for t in inputs]
