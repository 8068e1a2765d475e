"""`moe`: squared-ReLU experts against a loop over tokens, float64, and autograd."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close, assert_equal_to_float64
from support import assert_refused, assert_rule, backends, bad_calls, checked_mode, device_of

from yaongi.kernels import moe, moe_route, use_backend
from yaongi.kernels.moe.reference import moe_backward_reference

FLOAT_ARGUMENTS = ("x", "w_up", "w_down", "expert_weights")
ROUTINGS = {  # T, D, F, E, K, and a change of the ids
    "usual": (9, 8, 6, 5, 2, None),
    "one token": (1, 8, 6, 5, 2, None),
    "no token": (0, 8, 6, 5, 2, None),
    "no expert a token": (4, 8, 6, 5, 0, None),
    "one expert a token": (7, 8, 6, 5, 1, None),
    "every expert a token": (7, 8, 6, 4, 4, None),
    "one expert": (7, 8, 6, 1, 1, None),
    "all on one expert": (9, 8, 6, 5, 1, lambda ids: ids * 0 + 3),
    "empty experts": (9, 8, 6, 7, 2, lambda ids: 2 * (ids % 2) + 1),
    "bad ids": (9, 8, 6, 5, 2, lambda ids: torch.where(ids == 1, -3, torch.where(ids == 4, 5, ids)).int()),
    "only bad ids": (3, 8, 6, 5, 2, lambda ids: ids - 100),
    "odd sizes": (13, 7, 5, 3, 2, None),
}


def arguments(
    T: int,
    D: int,
    F: int,
    E: int,
    K: int,
    change_ids: Any = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Return arguments of one call: distinct experts per token, entries of a usual size."""
    ids = torch.rand(T, E).argsort(-1)[:, :K].int()
    made = {
        "x": torch.randn(T, D).to(dtype),
        "w_up": (torch.randn(E, F, D) / D**0.5).to(dtype),
        "w_down": (torch.randn(E, D, F) / F**0.5).to(dtype),
        "expert_ids": change_ids(ids) if change_ids else ids,
        "expert_weights": torch.rand(T, K).to(torch.promote_types(dtype, torch.float32)),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def working_dtype(backend: str) -> torch.dtype:
    """Return the widest dtype that a backend takes."""
    return torch.bfloat16 if backend == "triton" else torch.float32


def token_loop(
    x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
) -> torch.Tensor:
    """Compute the definition token by token; differentiable by autograd."""
    rows = []
    for token, ids, weights in zip(x, expert_ids.tolist(), expert_weights, strict=True):
        row = torch.zeros_like(token)
        for expert, weight in zip(ids, weights, strict=True):
            if 0 <= expert < w_up.shape[0]:
                row = row + weight * (w_down[expert] @ (w_up[expert] @ token).relu() ** 2)
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def forward_and_gradients(
    function: Any, args: dict[str, torch.Tensor], wanted: Any = FLOAT_ARGUMENTS
) -> dict[str, torch.Tensor]:
    """Return y and the gradients of Σ y·cos(0, 1, 2, …) with respect to the wanted arguments."""
    args = {name: t.detach().requires_grad_(name in wanted) for name, t in args.items()}
    y = function(**args)
    if not y.requires_grad:
        return {"y": y.detach()}
    dy = torch.arange(y.numel(), dtype=torch.float64, device=y.device).cos().view(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, [args[name] for name in wanted], dy, allow_unused=True)
    zeros = {name: torch.zeros_like(args[name]) for name in wanted}
    return {"y": y.detach()} | {f"d{n}": zeros[n] if g is None else g for n, g in zip(wanted, grads, strict=True)}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_the_token_loop(routing: str) -> None:
    args = arguments(*ROUTINGS[routing])
    results, expected = forward_and_gradients(moe, args), forward_and_gradients(token_loop, args)
    for name, value in expected.items():
        assert_equal_to_float64(results[name], value, 1e-13, name)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("T", "D", "F", "E", "K", "change_ids"),
    [
        (400, 64, 48, 8, 2, None),
        (200, 64, 48, 8, 2, None),
        (24, 512, 272, 16, 2, None),
        (1, 16, 16, 4, 4, None),
        (0, 32, 16, 4, 2, None),
        (130, 32, 80, 6, 1, lambda ids: ids * 0 + 2),
        (77, 48, 32, 16, 3, lambda ids: torch.where(ids == 1, -1, torch.where(ids == 2, 16, ids)).int()),
    ],
    ids=["usual", "few tokens", "fewer", "one token", "no token", "all on one expert", "bad ids"],
)
def test_float64_rule(
    T: int, D: int, F: int, E: int, K: int, change_ids: Any, dtype: torch.dtype, backend: str
) -> None:
    if backend == "triton" and dtype == torch.float32:
        pytest.skip("the Triton path takes float16 and bfloat16")
    args = arguments(T, D, F, E, K, change_ids, dtype, device_of(backend, "moe"))
    assert_rule(lambda a: forward_and_gradients(moe, a), args, backend)


@pytest.mark.parametrize("backend", backends("triton"))
def test_a_nan_in_a_weight_shows_in_the_output(backend: str) -> None:
    """relu must not turn a NaN into 0: a trainer would see a finite loss and NaN gradients."""
    args = arguments(40, 32, 16, 4, 2, dtype=torch.bfloat16, device=device_of(backend, "moe"))
    args["w_up"][1, 3, 5] = torch.nan
    with use_backend(backend):
        y = moe(**args)
    touched = (args["expert_ids"] == 1).any(-1)
    assert touched.any()
    assert not touched.all()
    assert torch.equal(y.isnan().any(-1), touched)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("T", [8, 64])
def test_few_tokens_do_not_depend_on_each_other(T: int, backend: str) -> None:
    """Not even on one that is NaN: a row has the same bits in a batch of half the size."""
    args = arguments(T, 64, 48, 16, 4, dtype=torch.bfloat16, device=device_of(backend, "moe"))
    with use_backend(backend):
        together = moe(**args)
        half = {name: t[: T // 2] if t.shape[0] == T else t for name, t in args.items()}
        assert backend == "reference" or torch.equal(moe(**half), together[: T // 2])
        args["x"][T // 2] = torch.nan
        beside = moe(**args)
    assert beside[T // 2].isnan().all()
    beside[T // 2] = together[T // 2]
    assert torch.equal(beside, together)


@pytest.mark.parametrize("backend", backends("triton"))
def test_non_contiguous_arguments(backend: str) -> None:
    args = arguments(33, 32, 16, 4, 2, dtype=working_dtype(backend), device=device_of(backend, "moe"))
    strided = {name: t.mT.contiguous().mT for name, t in args.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    assert_rule(lambda a: forward_and_gradients(moe, a), strided, backend)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("routing", ["usual", "no token", "empty experts", "bad ids"])
def test_weight_gradients_are_added(routing: str, backend: str) -> None:
    """They are added unrounded; sums of experts without tokens keep their bits, and other gradients don't change."""
    T, D, F, E, K, change = ROUTINGS[routing]
    device = device_of(backend, "moe")
    args = arguments(20 * T, 16 * D, 16 * F, E, K, change, working_dtype(backend), device)
    dy = torch.randn_like(args["x"])
    sums = [torch.randn(args[name].shape, device=device) for name in ("w_up", "w_down")]
    before = [t.clone() for t in sums]

    def gradients(dtype: torch.dtype, **more: Any) -> list[torch.Tensor | None]:
        wide = torch.promote_types(dtype, torch.float32)
        leaves = {n: args[n].to(wide if n == "expert_weights" else dtype).requires_grad_() for n in FLOAT_ARGUMENTS}
        y = moe(**leaves, expert_ids=args["expert_ids"], **more)
        return list(torch.autograd.grad(y, list(leaves.values()), dy.to(dtype), allow_unused=True))

    with use_backend("reference"):
        exact, plain = gradients(torch.float64), gradients(args["x"].dtype)
    with use_backend(backend):
        usual = gradients(args["x"].dtype)
        dx, *none, dweights = gradients(args["x"].dtype, weight_gradients=tuple(sums))
    assert none == [None, None]
    assert torch.equal(dx, usual[0])
    assert torch.equal(dweights, usual[3])
    for total, start, wanted, rounded in zip(sums, before, exact[1:3], plain[1:3], strict=True):
        assert_close(total, start.double() + wanted, start + rounded.float())
        untouched = (wanted == 0).flatten(1).all(1)
        assert torch.equal(total[untouched], start[untouched])


def test_rows_of_the_activation_are_sorted_by_expert() -> None:
    args = arguments(6, 8, 5, 4, 2, lambda ids: torch.where(ids == 2, 9, ids).int())
    _, a = torch.ops.yaongi.moe(**args)
    pairs = [(e, p) for e in range(4) for p, chosen in enumerate(args["expert_ids"].flatten().tolist()) if chosen == e]
    rows = [(args["w_up"][e] @ args["x"][p // 2]).relu() ** 2 for e, p in pairs]
    assert a.shape == (12, 5)
    assert_equal_to_float64(a[: len(rows)], torch.stack(rows), 1e-13)


@pytest.mark.parametrize("backend", backends("triton"))
def test_one_activation_is_saved(backend: str) -> None:
    args = arguments(64, 32, 16, 4, 2, dtype=torch.bfloat16, device=device_of(backend, "moe"))
    args = {name: t.requires_grad_(t.is_floating_point()) for name, t in args.items()}
    known = {t.untyped_storage().data_ptr() for t in args.values()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = moe(**args)
    assert y.requires_grad
    assert sum(saved.values()) == 2 * 64 * 2 * 16  # bytes of bfloat16 times T·K·F


def test_gradcheck() -> None:
    args = arguments(5, 4, 3, 4, 2)
    inputs = [t.requires_grad_(t.is_floating_point()) for t in args.values()]
    assert torch.autograd.gradcheck(moe, inputs)


@pytest.mark.parametrize("backend", backends("triton"))
def test_gradients_of_any_subset(backend: str) -> None:
    args = arguments(20, 16, 16, 4, 2, dtype=working_dtype(backend), device=device_of(backend, "moe"))
    subsets = [wanted for count in range(4) for wanted in itertools.combinations(FLOAT_ARGUMENTS, count)]
    with use_backend(backend):
        everything = forward_and_gradients(moe, args)
        for wanted in subsets:
            results = forward_and_gradients(moe, args, wanted)
            assert set(results) == {"y", *(f"d{name}" for name in wanted)}
            assert all(torch.equal(value, everything[name]) for name, value in results.items())


def test_a_second_derivative_is_refused() -> None:
    args = arguments(4, 8, 6, 3, 2)
    x = args["x"].requires_grad_()
    (dx,) = torch.autograd.grad(moe(**args).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_backward: there is no derivative of this op"):
        dx.sum().backward()


@pytest.mark.parametrize("routing", ["usual", "no token", "bad ids"])
def test_opcheck(routing: str) -> None:
    args = arguments(*ROUTINGS[routing], torch.float32)
    needing = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in args.items()}
    torch.library.opcheck(torch.ops.yaongi.moe.default, (), needing)
    y, a = torch.ops.yaongi.moe(**args)
    backward = (torch.ones_like(y), *args.values(), a)
    torch.library.opcheck(torch.ops.yaongi.moe_backward.default, backward)
    sums = (torch.zeros_like(args["w_up"]), torch.zeros_like(args["w_down"]))
    torch.library.opcheck(torch.ops.yaongi.moe_backward_accumulate.default, (*backward, *sums))


def routed(x: torch.Tensor, logits: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
    """Compute router and experts, as a layer uses them."""
    ids, weights, _ = moe_route(logits, torch.zeros_like(logits[0]), 2, 2.5)
    return moe(x, w_up, w_down, ids, weights)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str) -> None:
    args = arguments(9, 8, 6, 5, 2, dtype=torch.float32)
    args = {"logits": torch.randn(9, 5), **{name: args[name] for name in ("x", "w_up", "w_down")}}
    expected = forward_and_gradients(routed, args, tuple(args))
    compiled = torch.compile(routed, fullgraph=True, backend=compiler)
    for name, value in forward_and_gradients(compiled, args, tuple(args)).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(0, 12), D=st.integers(1, 9), F=st.integers(1, 9), E=st.integers(1, 6), K=st.integers(0, 4),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape_and_routing(T: int, D: int, F: int, E: int, K: int, seed: int) -> None:
    torch.manual_seed(seed)
    args = arguments(T, D, F, E, min(K, E))
    args["expert_ids"] = torch.randint(-1, E + 1, args["expert_ids"].shape, dtype=torch.int32)  # repeated, bad ids
    results, expected = forward_and_gradients(moe, args), forward_and_gradients(token_loop, args)
    for name, value in expected.items():
        assert_equal_to_float64(results[name], value, 1e-12, name)


@bad_calls(
    [
        (
            {"expert_ids": torch.tensor([[0, 1], [2, 3]]).int()},
            ValueError,
            "expert_ids must be 0 to 2 (E - 1), or -1 for none, got 3",
        ),
        (
            {"expert_ids": torch.tensor([[0, 1], [2, -2]]).int()},
            ValueError,
            "expert_ids must be 0 to 2 (E - 1), or -1 for none, got -2",
        ),
        (
            {"expert_ids": torch.tensor([[0, 1], [2, 2]]).int()},
            ValueError,
            "expert_ids must name an expert once per token, got 2 twice in token 1",
        ),
        ({"x": torch.full((2, 8), torch.nan)}, ValueError, "x must be finite, got 16 non-finite values"),
        ({"w_up": torch.full((3, 6, 8), torch.inf)}, ValueError, "w_up must be finite, got 144 non-finite values"),
        ({"w_down": torch.full((3, 8, 6), torch.nan)}, ValueError, "w_down must be finite, got 144 non-finite values"),
        (
            {"expert_weights": torch.tensor([[0, torch.nan], [0, 0]])},
            ValueError,
            "expert_weights must be finite, got 1 non-finite values",
        ),
    ]
)
def test_checked_mode(bad: Any) -> None:
    good = arguments(2, 8, 6, 3, 2, dtype=torch.float32)
    with checked_mode():
        moe(**good)
        moe(**good | {"expert_ids": torch.tensor([[0, 1], [-1, -1]]).int()})
        assert_refused(moe, good, bad)
    moe(**good | bad.changes)


def bad_arguments() -> Any:
    """Yield bad calls for T 4, D 8, F 6, E 3, K 2 in float32."""
    ids = torch.tensor([[0, 1]] * 4).int()
    half, meta, empty = torch.float16, torch.device("meta"), torch.empty
    tensor = "must be a tensor, got"
    floats = "must be float16 or bfloat16 or float32 or float64, got"
    first = "must be on cpu like the first tensor, got meta"
    yield {"x": None}, TypeError, f"x {tensor} NoneType"
    yield {"x": [[1.0] * 8] * 4}, TypeError, f"x {tensor} list"
    yield {"x": torch.ones(4, 8, dtype=torch.int64)}, TypeError, f"x {floats} int64"
    yield {"x": torch.ones(4, 8, dtype=torch.complex64)}, TypeError, f"x {floats} complex64"
    yield {"x": torch.ones(4, 8, dtype=half)}, TypeError, "w_up must be float16, got float32"
    yield {"x": torch.ones(8)}, ValueError, "x must be (T, D), got (8,)"
    yield {"x": torch.ones(1, 4, 8)}, ValueError, "x must be (T, D), got (1, 4, 8)"
    yield {"x": torch.ones(4, 9)}, ValueError, "w_up must be (E, F, D) = (E, F, 9), got (3, 6, 8)"
    yield {"x": torch.ones(5, 8)}, ValueError, "expert_ids must be (T, K) = (5, K), got (4, 2)"
    yield {"x": empty(4, 8, device=meta)}, TypeError, "w_up must be on meta like the first tensor, got cpu"
    yield {"w_up": 1.0}, TypeError, f"w_up {tensor} float"
    yield {"w_up": torch.ones(3, 6, 8, dtype=half)}, TypeError, "w_up must be float32, got float16"
    yield {"w_up": torch.ones(6, 8)}, ValueError, "w_up must be (E, F, D) = (E, F, 8), got (6, 8)"
    yield {"w_up": torch.ones(3, 8, 6)}, ValueError, "w_up must be (E, F, D) = (E, F, 8), got (3, 8, 6)"
    yield {"w_up": empty(3, 6, 8, device=meta)}, TypeError, f"w_up {first}"
    yield {"w_down": "w"}, TypeError, f"w_down {tensor} str"
    yield {"w_down": torch.ones(3, 8, 6).double()}, TypeError, "w_down must be float32, got float64"
    yield {"w_down": torch.ones(8, 6)}, ValueError, "w_down must be (E, D, F) = (3, 8, 6), got (8, 6)"
    yield {"w_down": torch.ones(3, 6, 8)}, ValueError, "w_down must be (E, D, F) = (3, 8, 6), got (3, 6, 8)"
    yield {"w_down": torch.ones(4, 8, 6)}, ValueError, "w_down must be (E, D, F) = (3, 8, 6), got (4, 8, 6)"
    yield {"w_down": empty(3, 8, 6, device=meta)}, TypeError, f"w_down {first}"
    yield {"expert_ids": None}, TypeError, f"expert_ids {tensor} NoneType"
    yield {"expert_ids": ids.long()}, TypeError, "expert_ids must be int32, got int64"
    yield {"expert_ids": ids.float()}, TypeError, "expert_ids must be int32, got float32"
    yield {"expert_ids": ids[0]}, ValueError, "expert_ids must be (T, K) = (4, K), got (2,)"
    yield {"expert_ids": ids[:3]}, ValueError, "expert_ids must be (T, K) = (4, K), got (3, 2)"
    yield {"expert_ids": ids[:, :1]}, ValueError, "expert_weights must be (T, K) = (4, 1), got (4, 2)"
    yield {"expert_ids": ids.to(meta)}, TypeError, f"expert_ids {first}"
    yield {"expert_weights": 0.5}, TypeError, f"expert_weights {tensor} float"
    yield {"expert_weights": torch.ones(4, 2, dtype=half)}, TypeError, "expert_weights must be float32, got float16"
    yield {"expert_weights": torch.ones(4, 2).double()}, TypeError, "expert_weights must be float32, got float64"
    yield {"expert_weights": torch.ones(8)}, ValueError, "expert_weights must be (T, K) = (4, 2), got (8,)"
    yield {"expert_weights": torch.ones(4, 3)}, ValueError, "expert_weights must be (T, K) = (4, 2), got (4, 3)"
    yield {"expert_weights": empty(4, 2, device=meta)}, TypeError, f"expert_weights {first}"
    up, down = torch.zeros(3, 6, 8), torch.zeros(3, 8, 6)
    named = "weight_gradients' dw_up must be"
    yield {"weight_gradients": (up.half(), down)}, TypeError, f"{named} float32, got float16"
    yield {"weight_gradients": (down, down)}, ValueError, f"{named} (E, F, D) = (3, 6, 8), got (3, 8, 6)"
    yield {"weight_gradients": (down.mT, down)}, ValueError, f"{named} contiguous, got strides (48, 1, 6)"
    yield (
        {"weight_gradients": (up, empty(3, 8, 6, device=meta))},
        TypeError,
        "weight_gradients' dw_down must be on cpu like the first tensor, got meta",
    )


@bad_calls(bad_arguments())
def test_bad_arguments(bad: Any) -> None:
    assert_refused(moe, arguments(4, 8, 6, 3, 2, dtype=torch.float32), bad)


def test_backward_reference_takes_a_strided_gradient() -> None:
    args = arguments(5, 4, 3, 4, 2)
    y, a = torch.ops.yaongi.moe(**args)
    expanded = moe_backward_reference(torch.ones(1, 1).double().expand_as(y), *args.values(), a)
    dense = moe_backward_reference(torch.ones_like(y), *args.values(), a)
    assert all(torch.equal(one, other) for one, other in zip(expanded, dense, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(8))
def test_fuzz(part: int) -> None:
    """The tolerance rule holds for 200 random shapes and routings, some with bad ids; most time is compilation."""
    for seed in range(part, 200, 8):
        torch.manual_seed(seed)
        T, D, F = (int(torch.randint(low, high, ())) for low, high in ((1, 400), (1, 20), (1, 20)))
        E = int(torch.randint(1, 257 if seed % 4 == 0 else 33, ()))
        K = int(torch.randint(1, min(E, 16) + 1, ()))
        skewed = torch.rand(T, E) ** torch.arange(1, E + 1) if seed % 3 == 0 else torch.rand(T, E)
        ids = skewed.argsort(-1, descending=True)[:, :K].int()
        if seed % 5 == 0:
            ids = torch.where(torch.rand(T, K) < 0.1, torch.randint(-3, E + 3, (T, K)), ids).int()
        args = arguments(T, 16 * D, 16 * F, E, K, lambda _, ids=ids: ids, torch.bfloat16, "cuda")
        assert_rule(lambda a: forward_and_gradients(moe, a), args, "triton")


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    """With T·K·D beyond 2³¹, the last tokens' results have the same bits as in a call with these tokens alone."""
    T, D, F, E, K, last = 2**17 + 100, 2048, 16, 16, 8, 64
    assert T * K * D > 2**31
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    x, dy = torch.randn(T, D, **bf16), torch.randn(T, D, **bf16)
    w_up, w_down = torch.randn(E, F, D, **bf16) / 45, torch.randn(E, D, F, **bf16) / 4
    ids, weights = torch.rand(T, E, device="cuda").argsort(-1)[:, :K].int(), torch.rand(T, K, device="cuda")
    results = []
    for rows in (slice(None), slice(T - last, None)):
        leaves = [x[rows].clone().requires_grad_(), weights[rows].clone().requires_grad_()]
        y = moe(leaves[0], w_up, w_down, ids[rows], leaves[1])
        results.append([t[-last:] for t in (y.detach(), *torch.autograd.grad(y, leaves, dy[rows]))])
    for whole, alone in zip(*results, strict=True):
        assert torch.equal(whole, alone)
        assert whole.abs().max() > 0


@pytest.mark.gpu
def test_graph_capture_and_side_stream() -> None:
    """No host synchronisation: the op can be captured on a side stream and replayed with another routing."""
    shape = (300, 64, 48, 8, 2)
    args = arguments(*shape, dtype=torch.bfloat16, device="cuda")
    forward_and_gradients(moe, args)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        captured = forward_and_gradients(moe, args)
    for name, value in arguments(*shape, dtype=torch.bfloat16, device="cuda").items():
        args[name].copy_(value)
    graph.replay()
    for name, value in forward_and_gradients(moe, args).items():
        assert torch.equal(captured[name], value), name
