"""`symmetric_product`: α·X·Yᵀ + β·C against float64, in every layout its kernel takes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_equal_to_float64
from support import assert_refused, assert_rule, backends, bad_calls, checked_mode, converted, device_of

from yaongi.kernels import symmetric_product, use_backend

SMALL = [(1, 1), (8, 16), (5, 3), (3, 136, 264), (2, 3, 7, 4)]
ON_GPU = [(8, 16), (3, 136, 264), (2, 512, 2048), (1, 2048, 512), (5, 1000, 72)]
SHAPES = [
    *[pytest.param(shape, "reference", id=f"reference-{shape}") for shape in SMALL],
    *[pytest.param(shape, "cuda", id=f"cuda-{shape}", marks=pytest.mark.gpu) for shape in ON_GPU],
]
OPERANDS = ["x", "xy", "xc", "xyc"]


def arguments(shape: tuple[int, ...], operands: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Return operands with exactly symmetric X·Yᵀ and C: Y is X with columns scaled by signed powers of two."""
    x = torch.randn(shape).to(dtype)
    scales = 2.0 ** torch.randint(-2, 2, shape[-1:]) * (2 * torch.randint(0, 2, shape[-1:]) - 1)
    c = torch.randn(*shape[:-1], shape[-2]).to(dtype)
    made: dict[str, Any] = {"x": x, "y": x * scales.to(dtype), "c": c + c.mT}
    chosen: dict[str, Any] = {name: made[name].to(device) for name in operands}
    return chosen | {"alpha": -0.75, "beta": 1.5}


def by_definition(
    x: torch.Tensor, y: torch.Tensor | None = None, c: torch.Tensor | None = None, *, alpha: float = 1, beta: float = 1
) -> torch.Tensor:
    product = alpha * torch.einsum("...in,...jn->...ij", x, x if y is None else y)
    return product if c is None else product + beta * c


def product(args: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"s": symmetric_product(**args)}


def gradients(function: Any, args: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the gradients of Σ S·cos(0, 1, 2, …), whose dS isn't symmetric."""
    args = {name: t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for name, t in args.items()}
    s = function(**args)
    ds = torch.arange(s.numel(), dtype=torch.float64, device=s.device).cos().view(s.shape).to(s.dtype)
    names = [name for name, value in args.items() if isinstance(value, torch.Tensor)]
    return {f"d{n}": g for n, g in zip(names, torch.autograd.grad(s, [args[n] for n in names], ds), strict=True)}


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("shape", [*SMALL, (0, 4), (4, 0), (0, 4, 6), (2, 0, 0)], ids=str)
def test_equals_the_definition(shape: tuple[int, ...], operands: str) -> None:
    args = arguments(shape, operands, torch.float64)
    result = symmetric_product(**args)
    assert result.is_contiguous()
    assert_equal_to_float64(result, by_definition(**args), 1e-13)
    for name, value in gradients(by_definition, args).items():
        assert_equal_to_float64(gradients(symmetric_product, args)[name], value, 1e-13, name)


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "backend"), SHAPES)
def test_float64_rule(shape: tuple[int, ...], backend: str, dtype: torch.dtype, operands: str) -> None:
    args = arguments(shape, operands, dtype, device_of(backend, "symmetric_product"))
    assert_rule(product, args, backend)


@pytest.mark.parametrize("backend", backends("cuda"))
@pytest.mark.parametrize("shape", [(136, 72), (3, 264, 136)], ids=str)
def test_strided_rows_and_batches(shape: tuple[int, ...], backend: str) -> None:
    device = device_of(backend, "symmetric_product")
    args = arguments(shape, "xyc", torch.bfloat16, device)

    def in_larger(t: torch.Tensor) -> torch.Tensor:
        larger = torch.full((*t.shape[:-2], t.shape[-2] + 3, t.shape[-1] + 16), torch.nan, dtype=t.dtype, device=device)
        larger[..., : t.shape[-2], 8 : 8 + t.shape[-1]] = t
        return larger[..., : t.shape[-2], 8 : 8 + t.shape[-1]]

    strided = {name: in_larger(value) if isinstance(value, torch.Tensor) else value for name, value in args.items()}
    assert not strided["x"].is_contiguous()
    with use_backend(backend):
        assert torch.equal(symmetric_product(**strided), symmetric_product(**args))


@pytest.mark.parametrize("backend", backends("cuda"))
def test_gradients_in_bfloat16(backend: str) -> None:
    args = arguments((2, 136, 72), "xyc", torch.bfloat16, device_of(backend, "symmetric_product"))
    assert_rule(lambda a: gradients(symmetric_product, a), args, backend)


@pytest.mark.parametrize("wanted", ["x", "y", "c", "xc", "yc"])
def test_gradients_of_any_subset(wanted: str) -> None:
    args = arguments((5, 7), "xyc", torch.float64)
    everything = gradients(symmetric_product, args)
    needing = {n: t.requires_grad_(n in wanted) if isinstance(t, torch.Tensor) else t for n, t in args.items()}
    s = symmetric_product(**needing)
    s.backward(torch.arange(s.numel()).double().cos().view(s.shape))
    for name in "xyc":
        grad = needing[name].grad
        assert torch.equal(grad, everything[f"d{name}"]) if name in wanted else grad is None


@pytest.mark.parametrize("operands", OPERANDS)
def test_gradcheck(operands: str) -> None:
    args = arguments((2, 4, 3), operands, torch.float64)
    x, y, c = (args[name].requires_grad_() if name in args else None for name in "xyc")
    assert torch.autograd.gradcheck(lambda *t: symmetric_product(*t, alpha=-0.75, beta=1.5), (x, y, c))
    assert torch.autograd.gradgradcheck(lambda *t: symmetric_product(*t, alpha=-0.75, beta=1.5), (x, y, c))


@pytest.mark.parametrize("operands", OPERANDS)
def test_opcheck(operands: str) -> None:
    args = arguments((2, 5, 3), operands, torch.float32)
    x, y, c = (args[name].requires_grad_() if name in args else None for name in "xyc")
    torch.library.opcheck(torch.ops.yaongi.symmetric_product.default, (x, y, c, -0.75, 1.5))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str) -> None:
    compiled = torch.compile(symmetric_product, fullgraph=True, backend=compiler)
    for operands in ("x", "xyc"):
        args = arguments((2, 5, 3), operands, torch.float32)
        torch.testing.assert_close(compiled(**args), symmetric_product(**args))
        for name, value in gradients(symmetric_product, args).items():
            torch.testing.assert_close(gradients(compiled, args)[name], value, msg=name)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(st.integers(0, 3), max_size=2), m=st.integers(0, 20), n=st.integers(0, 20),
    operands=st.sampled_from(OPERANDS), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(batch: list[int], m: int, n: int, operands: str, seed: int) -> None:
    torch.manual_seed(seed)
    args = arguments((*batch, m, n), operands, torch.float64)
    result = symmetric_product(**args)
    assert_equal_to_float64(result, by_definition(**args), 1e-12)
    assert_equal_to_float64(result, result.mT, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operands", ["x", "xyc"])
def test_cuda_result_is_mirrored(operands: str, dtype: torch.dtype) -> None:
    """The result is bitwise symmetric even if X·Yᵀ isn't quite; its lower triangle counts."""
    args = arguments((2, 520, 256), operands, dtype, device_of("cuda", "symmetric_product"))
    if "y" in args:
        args["y"] = args["y"] + torch.randn_like(args["y"]) / 64
    with use_backend("cuda"):
        s = symmetric_product(**args)
    assert torch.equal(s, s.mT)
    args["c"] = args["c"].float() if "c" in args else None
    full = symmetric_product(args["x"].float(), **{n: t.float() for n, t in args.items() if n == "y"},
                             c=args["c"], alpha=args["alpha"], beta=args["beta"])  # fmt: skip
    torch.testing.assert_close(s.tril().float(), full.tril(), rtol=2e-2, atol=2e-1)


@pytest.mark.gpu
def test_cuda_reads_the_lower_triangle_alone() -> None:
    args = arguments((256, 64), "xc", torch.bfloat16, device_of("cuda", "symmetric_product"))
    with use_backend("cuda"):
        expected = symmetric_product(**args)
        args["c"][:128, 128:] = torch.nan  # a tile above the diagonal
        assert torch.equal(symmetric_product(**args), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(20000, 8, 24), (4000, 200, 8)], ids=str)
def test_cuda_tiles_that_follow_at_once(shape: tuple[int, ...]) -> None:
    """With one k-step per tile, the stores of the previous tile are still running when the next tile is ready."""
    args = arguments(shape, "xc", torch.float16, device_of("cuda", "symmetric_product"))
    expected = symmetric_product(**{n: t.float() if isinstance(t, torch.Tensor) else t for n, t in args.items()})
    with use_backend("cuda"):
        for _ in range(20):
            torch.testing.assert_close(symmetric_product(**args).float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
def test_cuda_on_a_side_stream() -> None:
    args = arguments((2, 512, 2048), "xyc", torch.bfloat16, device_of("cuda", "symmetric_product"))
    expected = symmetric_product(**args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), use_backend("cuda"):
        scaled = symmetric_product(**converted(args, lambda t: t * 2))  # these operands are made on that stream too
        result = symmetric_product(**args)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(result, expected)
    assert scaled.isfinite().all()


@pytest.mark.gpu
def test_cuda_graph() -> None:
    args = arguments((3, 136, 264), "xyc", torch.bfloat16, device_of("cuda", "symmetric_product"))
    with use_backend("cuda"):
        symmetric_product(**args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = symmetric_product(**args)
        for _ in range(2):
            args["x"].normal_()
            args["y"].copy_(args["x"])
            graph.replay()
            assert torch.equal(result, symmetric_product(**args))


@pytest.mark.gpu
def test_two_views_of_one_batch_are_two_operands() -> None:
    """They start at the same address, but only the first matrices are the same."""
    batch = torch.randn(8, 64, 64, device="cuda", dtype=torch.float16)
    x, y = batch[::2], batch[:4]
    with use_backend("cuda"):
        result = symmetric_product(x, y)
        assert torch.equal(result, symmetric_product(x.clone(), y.clone()))
        assert not torch.equal(result[1:], symmetric_product(x)[1:])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (torch.Tensor.float, "it takes float16 and bfloat16, got float32"),
        (lambda t: t[:13], "it takes m and n that are multiples of 8, got m = 13, n = 64"),
        (lambda t: t[:, :60], "it takes m and n that are multiples of 8, got m = 16, n = 60"),
    ],
)
def test_cuda_says_what_it_refuses(change: Any, reason: str) -> None:
    x = change(torch.randn(16, 64, device=device_of("cuda", "symmetric_product")).bfloat16())
    with use_backend("cuda"), pytest.raises(RuntimeError) as caught:
        symmetric_product(x)
    assert str(caught.value) == f'symmetric_product: use_backend("cuda") is impossible here: {reason}'
    assert_rule(product, {"x": x}, "reference")


def test_forced_backend_on_the_cpu() -> None:
    for op in (None, "symmetric_product"):
        with use_backend("reference", op=op):
            assert torch.equal(symmetric_product(torch.ones(2, 3)), torch.full((2, 2), 3.0))


@bad_calls(
    [
        ({"x": torch.full((4, 6), torch.nan)}, ValueError, "x must be finite, got 24 non-finite values"),
        ({"y": torch.full((4, 6), torch.inf)}, ValueError, "y must be finite, got 24 non-finite values"),
        ({"c": torch.full((4, 4), torch.nan)}, ValueError, "c must be finite, got 16 non-finite values"),
    ]
)
def test_checked_mode(bad: Any) -> None:
    good = {"x": torch.ones(4, 6)}
    with checked_mode():
        symmetric_product(**good)
        assert_refused(symmetric_product, good, bad)
    symmetric_product(**good | bad.changes)


FLOATS = "must be float16 or bfloat16 or float32 or float64"


@bad_calls(
    [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"x": torch.ones(4, 6).int()}, TypeError, f"x {FLOATS}, got int32"),
        ({"x": torch.ones(4, 6).half()}, TypeError, "y must be float16, got float32"),
        ({"x": torch.ones(6)}, ValueError, "x must be (..., m, n), got (6,)"),
        ({"x": torch.ones(6, 4).mT}, ValueError, "x must have stride 1 along n, got strides (1, 4)"),
        ({"x": torch.ones(4, 7)}, ValueError, "y must be (..., m, n) = (..., 4, 7), got (4, 6)"),
        ({"x": torch.ones(4, 6, device="meta")}, TypeError, "y must be on meta like the first tensor, got cpu"),
        ({"y": 2.0}, TypeError, "y must be a tensor, got float"),
        ({"y": torch.ones(4, 6).bfloat16()}, TypeError, "y must be float32, got bfloat16"),
        ({"y": torch.ones(5, 6)}, ValueError, "y must be (..., m, n) = (..., 4, 6), got (5, 6)"),
        ({"y": torch.ones(6)}, ValueError, "y must be (..., m, n) = (..., 4, 6), got (6,)"),
        ({"y": torch.ones(2, 4, 6)}, ValueError, "y must be batched as x, (), got (2,)"),
        ({"y": torch.ones(6, 4).mT}, ValueError, "y must have stride 1 along n, got strides (1, 4)"),
        ({"y": torch.ones(4, 6, device="meta")}, TypeError, "y must be on cpu like the first tensor, got meta"),
        ({"c": [[1.0]]}, TypeError, "c must be a tensor, got list"),
        ({"c": torch.ones(4, 4).double()}, TypeError, "c must be float32, got float64"),
        ({"c": torch.ones(4, 6)}, ValueError, "c must be (..., m, m) = (..., 4, 4), got (4, 6)"),
        ({"c": torch.ones(1, 4, 4)}, ValueError, "c must be batched as x, (), got (1,)"),
        ({"c": torch.ones(4, 8)[:, ::2]}, ValueError, "c must have stride 1 along m, got strides (8, 2)"),
        ({"c": torch.ones(4, 4, device="meta")}, TypeError, "c must be on cpu like the first tensor, got meta"),
        ({"alpha": "1"}, TypeError, "alpha must be a number, got str"),
        ({"alpha": float("inf")}, ValueError, "alpha must be finite, got inf"),
        ({"alpha": torch.ones(())}, TypeError, "alpha must be a number, got Tensor"),
        ({"beta": None}, TypeError, "beta must be a number, got NoneType"),
        ({"beta": float("nan")}, ValueError, "beta must be finite, got nan"),
    ]
)
def test_bad_arguments(bad: Any) -> None:
    good = {"x": torch.ones(4, 6), "y": torch.ones(4, 6), "c": torch.ones(4, 4), "alpha": 1.0, "beta": 0.5}
    assert_refused(symmetric_product, good, bad)
