"""`mamba_scan` on a GPU: all sizes, 200 random calls, slices and segments, graphs, a million tokens."""

import itertools
import random
from typing import Any

import pytest
import torch
from mamba_support import DIFFERENTIABLE, OPTIONAL, arguments, differentiable, positional
from op_cases import cases, run
from support import converted, outputs_and_gradients

from yaongi.kernels import mamba_scan, use_backend


def assert_near(
    results: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], what: str
) -> None:
    """Assert that each Frobenius error is at most 1 % plus, for cancelling terms, thrice the plain computation's.

    Float32 results: 0.6 %, since the states whose product is a term of dA are stored in 16 bits.
    """
    for name, value in exact.items():
        error, allowed = (results[name].double() - value).norm(), (plain[name].double() - value).norm()
        relative = 6e-3 if results[name].dtype == torch.float32 else 1e-2
        assert error <= relative * value.norm() + 3 * allowed + 1e-6, (
            f"{what} {name}: error {error:.2e} of {value.norm():.2e}"
        )


def on_gpu(args: dict[str, Any], backend: Any, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return outputs and gradients of a backend, optionally in another dtype."""
    args = converted(args, lambda t: t if dtype is None else t.to(dtype))
    with use_backend(backend):
        return outputs_and_gradients(mamba_scan, args, differentiable(args))


def check_on_gpu(args: dict[str, Any], what: str) -> None:
    """Compare Triton's results with the reference's in float64 and in the arguments' dtype."""
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
    """States of all heads at once, of some, or of one; the sequence unsegmented or in segments."""
    from yaongi.kernels.mamba_scan import decays
    from yaongi.kernels.mamba_scan import scan_backward as gradients

    args = arguments((2, 8, 16, groups, 16), 1000, (300, 700), dtype=torch.bfloat16, device="cuda")
    for slots in (1, 64):
        monkeypatch.setattr(decays, "RESIDENT_PROGRAMS", slots)
        for bound in (1e9, 1e5, 1.0):
            monkeypatch.setattr(gradients, "STATES_BYTES", bound)
            check_on_gpu(args, f"{slots} {bound}")


@pytest.mark.gpu
def test_fuzz_on_a_gpu() -> None:
    """Check 200 random shapes and document layouts."""
    generator = random.Random(0)
    for case in range(200):
        G, heads_per_group, B = generator.choice((1, 2, 3)), generator.choice((1, 2, 4)), generator.choice((1, 2, 5))
        L = generator.choice((1, 2, 31, 63, 64, 65, 127, 128, 129, 200, 511, 1000)) + generator.choice((0, 0, 7))
        cuts = sorted({0, L, *(generator.randrange(L) for _ in range(generator.choice((0, 1, 3, 20))))})
        lengths = tuple(b - a for a, b in itertools.pairwise(cuts))
        absent = OPTIONAL if case % 2 else ()
        torch.manual_seed(case)
        args = arguments((B, G * heads_per_group, 16, G, 32), L, lengths, absent, dtype=torch.bfloat16, device="cuda")
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
    """Offsets beyond 2^31 elements: the row's last tokens equal a call on these tokens from the state before them."""
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
    parts = {"y": z, "final": end}
    assert_near({"y": y[:, cut:], "final": final}, {n: t.double() for n, t in parts.items()}, parts, "last tokens")


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "H", "G"), [("triton", 64, 1), (None, 40, 5)])
def test_a_million_tokens_backwards(backend: Any, H: int, G: int) -> None:
    """The last tokens' gradients equal those of a call on these tokens alone; db and dc are one sum over the heads."""
    L, cut, (P, N) = 1_000_000, 999_936, (64, 128)
    args = arguments((1, H, P, G, N), 128, absent=("initial_state", "dt_bias"), dtype=torch.bfloat16, device="cuda")
    names = ("x", "dt", "b", "c")
    long = {n: args[n].repeat(1, L // 128 + 1, *[1] * (args[n].dim() - 2))[:, :L] for n in names}
    given = args | {"return_final_state": False}

    def gradients(tokens: dict[str, torch.Tensor], **more: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = {n: t.detach().requires_grad_() for n, t in tokens.items()}
        with use_backend(backend):
            y = mamba_scan(**given | inputs | more)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = torch.autograd.grad(y[:, -64:].float().sum(), list(inputs.values()))
            results = sum(t.nbytes for t in found)
            peak = torch.cuda.max_memory_allocated() - before - results
            assert tokens is not long or peak < 3e9 + 2 * y.nbytes  # y's gradient, and what slices it
        return dict(zip(names, found, strict=True))

    whole = gradients(long)
    with torch.no_grad():
        _, state = mamba_scan(**args | {n: t[:, :cut] for n, t in long.items()})
    rest = gradients({n: t[:, cut:] for n, t in long.items()}, initial_state=state)
    plain = {n: t.double() for n, t in rest.items()}
    assert_near({n: t[:, cut:] for n, t in whole.items()}, plain, rest, "last tokens")


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["mamba_scan", "causal_conv1d"])
def test_a_batch_beyond_a_grids_dimension(op: str) -> None:
    """65,536 rows and one: the last ones equal a call on them alone."""
    case = cases()[op].one_row()
    arguments = {n: v for n, v in case.on("cuda").items() if n not in ("document_ids", "initial_state")}
    few = {n: v[:, :2] if n in ("x", "dt", "b", "c") else v for n, v in arguments.items()}
    many = {n: v.repeat(65_537, *[1] * (v.dim() - 1)) if n in ("x", "dt", "b", "c") else v for n, v in few.items()}
    wanted = tuple(n for n in case.wanted if n in few)
    one, all_rows = run(op, few, wanted), run(op, many, wanted)
    assert torch.equal(all_rows["output 0"][-1:], one["output 0"])
    assert all_rows["dx"].isfinite().all()
