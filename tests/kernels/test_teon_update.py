"""`teon_update`: against hand-written Muon and Teon steps."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close, assert_equal_to_float64
from support import assert_refused, backends, bad_calls, checked_mode, converted, device_of

from yaongi.kernels import newton_schulz, teon_update, use_backend
from yaongi.kernels.newton_schulz.op import POLAR_EXPRESS
from yaongi.kernels.newton_schulz.reference import teon_update_reference

NAMES = ("params", "grads", "momenta", "masters")
State = dict[str, Any]


def state(
    count: int, *shape: int, dtype: torch.dtype = torch.float64, masters: bool = False, device: str = "cpu"
) -> State:
    """Return lists of random tensors; the master weights are close to the parameters."""
    lists: State = {name: [torch.randn(shape).to(device, dtype) for _ in range(count)] for name in NAMES[:3]}
    wide = torch.promote_types(dtype, torch.float32)
    lists["masters"] = [p.to(wide) * 1.0001 for p in lists["params"]] if masters else None
    return lists


def step_by_hand(lists: State, stack: int, lr: float, momentum: float, nesterov: bool, weight_decay: float) -> State:
    """Compute the expected step out of place, from the concatenation of each stack."""
    momenta = [momentum * m + g for m, g in zip(lists["momenta"], lists["grads"], strict=True)]
    directions = [g + momentum * m if nesterov else m for m, g in zip(momenta, lists["grads"], strict=True)]
    m, n = directions[0].shape[-2:]
    weights = lists["masters"] or lists["params"]
    updated = []
    for i, weight in enumerate(weights):
        first = i // stack * stack
        joint = newton_schulz(torch.cat(directions[first : first + stack], dim=-1), form="standard")
        place = (i - first) * n
        updated.append((1 - lr * weight_decay) * weight - lr * math.sqrt(m / n) * joint[..., place : place + n])
    masters = updated if lists["masters"] else None
    params = [u.to(p.dtype) for u, p in zip(updated, lists["params"], strict=True)]
    return {"params": params, "grads": lists["grads"], "momenta": momenta, "masters": masters}


def assert_same(got: State, expected: State, relative: float = 1e-10) -> None:
    for name in NAMES:
        for i, value in enumerate(expected[name] or []):
            assert_equal_to_float64(got[name][i], value, relative, f"{name}[{i}]")


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("stack", "shape"), [(1, (6, 9)), (1, (9, 4)), (2, (6, 9)), (2, (12, 5)), (3, (2, 4, 4)), (6, (5, 2))]
)
def test_equals_the_step_by_hand(
    stack: int, shape: tuple[int, ...], nesterov: bool, weight_decay: float, masters: bool
) -> None:
    got = state(6, *shape, masters=masters)
    settings = {"stack": stack, "lr": 0.05, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    for _ in range(3):  # each step uses the momentum of the previous one
        got["grads"] = [torch.randn(shape, dtype=torch.float64) for _ in range(6)]
        expected = step_by_hand(converted(got, torch.clone), **settings)
        assert teon_update(**got, **settings) is None
        assert_same(got, expected)


@pytest.mark.parametrize("backend", backends("triton", "cuda"))
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize(("stack", "shape"), [(1, (3, 24, 40)), (2, (3, 40, 24)), (2, (24, 40))])
def test_matrices_that_are_not_active_stay_as_they_are(
    stack: int, shape: tuple[int, ...], masters: bool, backend: str
) -> None:
    """Not a bit of them changes, whatever their gradient, and the others change as if alone."""
    got = state(4, *shape, dtype=torch.bfloat16, masters=masters, device=device_of(backend, "teon_update"))
    start, all_active = converted(got, torch.clone), converted(got, torch.clone)
    active = torch.arange(4 // stack * (3 if len(shape) == 3 else 1)).view(4 // stack, *shape[:-2]) % 2 == 0
    for i, grad in enumerate(got["grads"]):
        grad[~active[i // stack].to(grad.device)] = torch.nan
    run(got, backend, stack=stack, lr=0.1, weight_decay=0.1, active=active.to(got["grads"][0].device))
    run(all_active, backend, stack=stack, lr=0.1, weight_decay=0.1)
    for name in ("params", "momenta", "masters") if masters else ("params", "momenta"):
        for i in range(4):
            mask = active[i // stack]
            for chosen, wanted in ((mask, all_active), (~mask, start)):
                assert torch.equal(got[name][i].cpu()[chosen], wanted[name][i].cpu()[chosen]), name
            assert not torch.equal(all_active[name][i], start[name][i])


def test_one_muon_step_in_numbers() -> None:
    """For an orthogonal gradient without history, the update is a known multiple of it."""
    weight, grad = torch.full((2, 2), 3.0).double(), torch.tensor([[0.0, 5], [-5, 0]]).double()
    value = torch.tensor(1 / math.sqrt(2)).double()  # the singular values after normalisation
    for a, b, c in POLAR_EXPRESS:
        value = a * value + b * value**3 + c * value**5
    teon_update([weight], [grad], [torch.zeros(2, 2).double()], lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(weight, 0.95 * 3 - 0.1 * value * grad / 5)


def test_batched_equals_each_alone() -> None:
    got = state(4, 3, 6, 9, masters=True)
    alone = [{name: [t[e].clone() for t in got[name]] for name in NAMES} for e in range(3)]
    teon_update(**got, stack=2, lr=0.1)
    for e, lists in enumerate(alone):
        teon_update(**lists, stack=2, lr=0.1)
        assert_same({name: [t[e] for t in got[name]] for name in NAMES}, lists, 1e-12)


def test_masters_keep_what_bfloat16_loses() -> None:
    got = state(2, 16, 24, dtype=torch.bfloat16)
    got["params"] = [torch.ones(16, 24).bfloat16() for _ in range(2)]
    got["masters"] = [p.float() for p in got["params"]]
    for _ in range(5):
        teon_update(**got, lr=2e-4)  # far below the spacing of bfloat16 at 1
    for param, master in zip(got["params"], got["masters"], strict=True):
        assert (param == 1).all()
        assert (master != 1).double().mean() > 0.95
        assert torch.equal(param, master.bfloat16())


def run(lists: State, backend: str, **settings: Any) -> State:
    """Return the lists after a step. The backend "plain" is the reference with float16 storage, as on a GPU."""
    if backend == "plain":
        flat = [value for step in POLAR_EXPRESS for value in step]
        values = {"momentum": 0.95, "nesterov": True, "weight_decay": 0.0, "coefficients": flat} | settings
        teon_update_reference(*(lists[n] or [] for n in NAMES), **values, storage=torch.float16)
    else:
        with use_backend(backend):  # type: ignore[arg-type]
            teon_update(**lists, **settings)
    return lists


def assert_rule(start: State, backend: str, **settings: Any) -> None:
    """Assert the tolerance rule for everything a step writes, and the same bits in a second run."""
    exact = run(converted(start, torch.Tensor.double), "reference", **settings)
    plain = run(converted(start, torch.clone), "reference" if backend == "reference" else "plain", **settings)
    first, second = (run(converted(start, torch.clone), backend, **settings) for _ in range(2))
    for name in NAMES:
        for i, value in enumerate(first[name] or []):
            assert_close(value, exact[name][i], plain[name][i], f"{name}[{i}]")
            assert torch.equal(value, second[name][i])


@pytest.mark.parametrize("backend", backends("triton", "cuda"))
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("stack", "shape"), [(1, (64, 128)), (2, (3, 40, 24)), (2, (3, 24, 40)), (4, (33, 7)), (2, (1, 9)), (1, (9, 1))]
)
def test_float64_rule(stack: int, shape: tuple[int, ...], dtype: torch.dtype, masters: bool, backend: str) -> None:
    start = state(4, *shape, dtype=dtype, masters=masters, device=device_of(backend, "teon_update"))
    assert_rule(start, backend, stack=stack, lr=0.02, weight_decay=0.1)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.gpu
def test_masters_float32_gradients_and_bfloat16_momenta(nesterov: bool, backend: str) -> None:
    """The dtypes of a training step, with gradients in another layout and parameters at unaligned addresses."""
    start = state(4, 5, 72, 136, dtype=torch.bfloat16, masters=True, device=device_of(backend, "teon_update"))
    start["grads"] = [torch.randn(5, 136, 72, device="cuda").mT for _ in range(4)]
    start["params"] = [torch.zeros(p.numel() + 1).to(p)[1:].view_as(p).copy_(p) for p in start["params"]]
    assert_rule(start, backend, stack=2, lr=0.02, weight_decay=0.1, nesterov=nesterov)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(("stack", "shape"), [(1, (3, 136, 72)), (2, (3, 40, 24)), (2, (24, 40))])
@pytest.mark.gpu
def test_last_product_by_torch(
    stack: int, shape: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of large matrices, with a separate pass over the weights."""
    from yaongi.kernels.newton_schulz import passes

    monkeypatch.setattr(passes, "FUSED_UP_TO", 0)
    start = state(4, *shape, dtype=torch.bfloat16, masters=True, device=device_of(backend, "teon_update"))
    assert_rule(start, backend, stack=stack, lr=0.02, weight_decay=0.1)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.gpu
def test_batches_within_the_workspace(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of any size, even within one parameter's experts, give the same bits as one batch."""
    from yaongi.kernels.newton_schulz import passes

    start = state(4, 5, 24, 40, dtype=torch.float32, device=device_of(backend, "teon_update"))
    whole = run(converted(start, torch.clone), backend, stack=2, lr=0.1)
    for bytes_ in (1, 30_000):
        monkeypatch.setattr(passes, "WORKSPACE", bytes_)
        assert_same(run(converted(start, torch.clone), backend, stack=2, lr=0.1), whole, 0)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.gpu
def test_nan_stays_in_its_stack(backend: str) -> None:
    start = state(4, 24, 40, dtype=torch.float32, device=device_of(backend, "teon_update"))
    start["grads"][1][3, 4] = torch.nan
    got = run(start, backend, stack=2, lr=0.1)
    assert got["params"][0].isnan().any()
    assert all(p.isfinite().all() for p in got["params"][2:])


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.gpu
def test_cuda_graph(backend: str) -> None:
    """A captured step, replayed on new gradients and other active matrices, does what a call does."""
    got = state(2, 3, 24, 40, dtype=torch.bfloat16, masters=True, device=device_of(backend, "teon_update"))
    active = torch.tensor([[True, False, True]], device="cuda")
    run(got, backend, stack=2, lr=0.1, active=active)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(got, backend, stack=2, lr=0.1, active=active)
    for _ in range(2):
        active.logical_not_()
        for grad in got["grads"]:
            grad.normal_()
        expected = run(converted(got, torch.clone), backend, stack=2, lr=0.1, active=active)
        graph.replay()
        assert_same(got, expected, 0)


@pytest.mark.gpu
def test_a_captured_call_leaves_later_ones_alone() -> None:
    """A graph fills its address tables only at replay; a call on its stream before that must use its own tables."""
    got = state(2, 24, 40, dtype=torch.bfloat16, masters=True, device=device_of("cuda", "teon_update"))
    expected = run(converted(got, torch.clone), "cuda", stack=2, lr=0.1)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        run(got, "cuda", stack=2, lr=0.1)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(got, "cuda", stack=2, lr=0.1)
    torch.cuda.synchronize()
    assert_same(got, expected, 0)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.gpu
def test_no_synchronisation(backend: str) -> None:
    """With this debug mode, torch raises if the host waits for the GPU."""
    got = state(4, 24, 40, dtype=torch.bfloat16, masters=True, device=device_of(backend, "teon_update"))
    active = torch.tensor([True, False], device="cuda")
    run(got, backend, stack=2, lr=0.1, active=active)
    got = converted(got, torch.clone)  # new addresses, so new tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(got, backend, stack=2, lr=0.1, active=active)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("nesterov", [False, True])
def test_zero_gradient_decays_alone(nesterov: bool) -> None:
    got = state(2, 6, 9, dtype=torch.float32)
    got["grads"] = [torch.zeros(6, 9) for _ in range(2)]
    got["momenta"] = [torch.zeros(6, 9) for _ in range(2)]
    before = [p.clone() for p in got["params"]]
    teon_update(**got, stack=2, lr=0.1, weight_decay=0.5, nesterov=nesterov)
    for param, old in zip(got["params"], before, strict=True):
        torch.testing.assert_close(param, 0.95 * old)
    assert not torch.stack(got["momenta"]).any()


def test_layouts_and_dtypes_of_gradients_and_momenta() -> None:
    got = state(2, 6, 9, dtype=torch.float32)
    got["grads"] = [g.bfloat16().mT.contiguous().mT for g in got["grads"]]
    got["momenta"] = [m.bfloat16() for m in got["momenta"]]
    expected = step_by_hand(converted(got, torch.Tensor.double), 2, 0.1, 0.95, True, 0.0)
    teon_update(tuple(got["params"]), tuple(got["grads"]), tuple(got["momenta"]), stack=2, lr=0.1)
    for i in range(2):
        assert_equal_to_float64(got["params"][i], expected["params"][i], 1e-5)
        assert torch.equal(got["momenta"][i], expected["momenta"][i].bfloat16())


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 6)], ids=str)
def test_empty_matrices(shape: tuple[int, ...]) -> None:
    lists = state(2, *shape)
    teon_update(**lists, stack=2, lr=0.1)
    assert all(tensor.shape == shape for name in NAMES[:3] for tensor in lists[name])


def test_no_matrices() -> None:
    lists: list[list[torch.Tensor]] = [[], [], [], []]
    teon_update(*lists, lr=0.1)
    assert lists == [[], [], [], []]


@settings(max_examples=30, deadline=None)
@given(
    stacks=st.integers(1, 3), stack=st.integers(1, 3), batch=st.lists(st.integers(1, 3), max_size=1),
    m=st.integers(1, 7), n=st.integers(1, 7), masters=st.booleans(), nesterov=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(
    stacks: int, stack: int, batch: list[int], m: int, n: int, masters: bool, nesterov: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    got = state(stacks * stack, *batch, m, n, masters=masters)
    expected = step_by_hand(converted(got, torch.clone), stack, 0.1, 0.95, nesterov, 0.1)
    teon_update(**got, stack=stack, lr=0.1, nesterov=nesterov, weight_decay=0.1)
    assert_same(got, expected, 1e-9)


def test_parameters_under_no_grad() -> None:
    got = state(1, 4, 6)
    got["params"] = [torch.nn.Parameter(p) for p in got["params"]]
    expected = step_by_hand(converted(got, torch.clone), 1, 0.1, 0.95, True, 0.0)
    version = got["params"][0]._version
    with torch.no_grad():
        teon_update(**got, lr=0.1)
    assert_same(converted(got, torch.clone), expected)
    assert got["params"][0].requires_grad
    assert got["params"][0]._version > version  # autograd notices the change in place


@pytest.mark.parametrize("masters", [False, True])
def test_opcheck(masters: bool) -> None:
    lists = state(4, 3, 5, masters=masters)
    flat = [value for step in POLAR_EXPRESS for value in step]
    arguments = (*(lists[name] or [] for name in NAMES), 2, 0.1, 0.95, True, 0.1, flat)
    for active in ((), (None,), (torch.tensor([True, False]),)):
        torch.library.opcheck(torch.ops.yaongi.teon_update.default, (*arguments, *active))


@pytest.mark.parametrize("masters", [False, True])
def test_compile(masters: bool) -> None:
    got = state(4, 5, 3, dtype=torch.float32, masters=masters)
    expected = converted(got, torch.clone)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(lists: State) -> None:
        teon_update(**lists, stack=2, lr=0.1, weight_decay=0.1)

    for _ in range(2):
        step(got)
        teon_update(**expected, stack=2, lr=0.1, weight_decay=0.1)
    assert_same(got, expected, 0)


def good(**changes: Any) -> State:
    """Return the arguments of a valid call on two 4 × 6 matrices in float32."""
    return state(2, 4, 6, dtype=torch.float32, masters=True) | {"stack": 2, "lr": 0.1} | changes


def pair(*shape: int, **options: Any) -> list[torch.Tensor]:
    return [torch.ones(shape, **options) for _ in range(2)]


def transposed() -> list[torch.Tensor]:
    return [t.mT for t in pair(6, 4)]


def second(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return a list of a valid tensor and this one."""
    return [torch.ones(4, 6), tensor]


@bad_calls(
    (
        {name: [torch.ones(4, 6), torch.full((4, 6), bad)]},
        ValueError,
        f"{name}[1] must be finite, got 24 non-finite values",
    )
    for name in NAMES
    for bad in (torch.nan, torch.inf)
)
def test_checked_mode(bad: Any) -> None:
    with checked_mode():
        teon_update(**good())
        assert_refused(teon_update, good(), bad)
    teon_update(**good(**converted(bad.changes, torch.clone)))


FLOATS = "must be float16 or bfloat16 or float32 or float64"
META = "must be on cpu like the first tensor, got meta"
NO_GRAD = "must be used under torch.no_grad() or detached (the op has no gradient), got requires_grad=True"
SHAPE = "must be (m, n) = (4, 6), got"
SHARED = torch.ones(4, 6)
DISTINCT = "params must be distinct from one another and from momenta and masters, got one tensor twice"


@bad_calls(
    [
        ({"params": torch.ones(2, 4, 6)}, TypeError, "params must be a list of tensors, got Tensor"),
        ({"params": None}, TypeError, "params must be a list of tensors, got NoneType"),
        ({"params": [1.0, 2.0]}, TypeError, "params[0] must be a tensor, got float"),
        ({"params": [torch.ones(4, 6), None]}, TypeError, "params[1] must be a tensor, got NoneType"),
        ({"params": pair(4, 6, dtype=torch.int32)}, TypeError, f"params[0] {FLOATS}, got int32"),
        ({"params": [torch.ones(4, 6), torch.ones(4, 6).half()]}, TypeError, "params[1] must be float32, got float16"),
        ({"params": pair(4, 6, dtype=torch.float64)}, TypeError, "masters[0] must be float64, got float32"),
        ({"params": pair(6)}, ValueError, "params[0] must be (m, n), got (6,)"),
        ({"params": pair(1, 1, 4, 6)}, ValueError, "params[0] must be (m, n), got (1, 1, 4, 6)"),
        ({"params": pair(2, 4, 6)}, ValueError, "grads[0] must be (E, m, n) = (2, 4, 6), got (4, 6)"),
        ({"params": [torch.ones(4, 6), torch.ones(6, 4)]}, ValueError, f"params[1] {SHAPE} (6, 4)"),
        ({"params": pair(4, 6, device="meta")}, TypeError, "grads[0] must be on meta like the first tensor, got cpu"),
        ({"params": transposed()}, ValueError, "params[0] must be contiguous, got strides (1, 4)"),
        ({"params": pair(4, 6, requires_grad=True)}, ValueError, f"params[0] {NO_GRAD}"),
        ({"params": [SHARED, SHARED]}, ValueError, DISTINCT),
        ({"params": [SHARED, torch.ones(4, 6)], "momenta": [torch.ones(4, 6), SHARED]}, ValueError, DISTINCT),
        ({"params": pair(4, 6)[:1]}, ValueError, "grads must be 1 tensors like params, got 2"),
        ({"params": []}, ValueError, "grads must be 0 tensors like params, got 2"),
        ({"grads": torch.ones(2, 4, 6)}, TypeError, "grads must be a list of tensors, got Tensor"),
        ({"grads": [torch.ones(4, 6), None]}, TypeError, "grads[1] must be a tensor, got NoneType"),
        ({"grads": pair(4, 6)[:1]}, ValueError, "grads must be 2 tensors like params, got 1"),
        ({"grads": pair(4, 6) * 2}, ValueError, "grads must be 2 tensors like params, got 4"),
        ({"grads": pair(4, 6, dtype=torch.int64)}, TypeError, f"grads[0] {FLOATS}, got int64"),
        ({"grads": [torch.ones(4, 6), torch.ones(4, 6).half()]}, TypeError, "grads[1] must be float32, got float16"),
        ({"grads": pair(6, 4)}, ValueError, f"grads[0] {SHAPE} (6, 4)"),
        ({"grads": pair(24)}, ValueError, f"grads[0] {SHAPE} (24,)"),
        ({"grads": pair(4, 6, device="meta")}, TypeError, f"grads[0] {META}"),
        ({"momenta": {}}, TypeError, "momenta must be a list of tensors, got dict"),
        ({"momenta": ["m", "m"]}, TypeError, "momenta[0] must be a tensor, got str"),
        ({"momenta": []}, ValueError, "momenta must be 2 tensors like params, got 0"),
        ({"momenta": pair(4, 6, dtype=torch.bool)}, TypeError, f"momenta[0] {FLOATS}, got bool"),
        ({"momenta": pair(4, 7)}, ValueError, f"momenta[0] {SHAPE} (4, 7)"),
        ({"momenta": pair(1, 4, 6)}, ValueError, f"momenta[0] {SHAPE} (1, 4, 6)"),
        ({"momenta": pair(4, 6, device="meta")}, TypeError, f"momenta[0] {META}"),
        ({"momenta": transposed()}, ValueError, "momenta[0] must be contiguous, got strides (1, 4)"),
        ({"momenta": pair(4, 6, requires_grad=True)}, ValueError, f"momenta[0] {NO_GRAD}"),
        ({"momenta": second(torch.ones(4, 6, device="meta"))}, TypeError, f"momenta[1] {META}"),
        ({"momenta": second(torch.ones(6, 4).mT)}, ValueError, "momenta[1] must be contiguous, got strides (1, 4)"),
        ({"momenta": second(torch.ones(4, 6, requires_grad=True))}, ValueError, f"momenta[1] {NO_GRAD}"),
        ({"grads": second(torch.ones(4, 6, device="meta"))}, TypeError, f"grads[1] {META}"),
        ({"masters": 1}, TypeError, "masters must be a list of tensors, got int"),
        ({"masters": [None, None]}, TypeError, "masters[0] must be a tensor, got NoneType"),
        ({"masters": []}, ValueError, "masters must be 2 tensors like params, got 0"),
        ({"masters": pair(4, 6, dtype=torch.bfloat16)}, TypeError, "masters[0] must be float32, got bfloat16"),
        ({"masters": pair(4, 5)}, ValueError, f"masters[0] {SHAPE} (4, 5)"),
        ({"masters": pair(4, 6, device="meta")}, TypeError, f"masters[0] {META}"),
        (
            {"masters": [torch.ones(1, 6).expand(4, 6)] * 2},
            ValueError,
            "masters[0] must be contiguous, got strides (0, 1)",
        ),
        ({"masters": pair(4, 6, requires_grad=True)}, ValueError, f"masters[0] {NO_GRAD}"),
        ({"stack": 0}, ValueError, "stack must be 1 or more, got 0"),
        ({"stack": 1.0}, TypeError, "stack must be an int, got float"),
        ({"stack": 3}, ValueError, "params must be a multiple of stack = 3 tensors, got 2"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, got str"),
        ({"lr": None}, TypeError, "lr must be a number, got NoneType"),
        ({"lr": float("nan")}, ValueError, "lr must be finite, got nan"),
        ({"lr": -0.1}, ValueError, "lr must be 0 or more, got -0.1"),
        ({"momentum": 1.0}, ValueError, "momentum must be less than 1, got 1.0"),
        ({"momentum": -0.5}, ValueError, "momentum must be 0 or more, got -0.5"),
        ({"momentum": True}, TypeError, "momentum must be a number, got bool"),
        ({"nesterov": 1}, TypeError, "nesterov must be a bool, got int"),
        ({"nesterov": None}, TypeError, "nesterov must be a bool, got NoneType"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay must be finite, got inf"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be 0 or more, got -1.0"),
        ({"weight_decay": []}, TypeError, "weight_decay must be a number, got list"),
        ({"active": [True]}, TypeError, "active must be a tensor, got list"),
        ({"active": torch.ones(1)}, TypeError, "active must be bool, got float32"),
        ({"active": torch.ones(2).bool()}, ValueError, "active must be (S) = (1), got (2,)"),
        ({"active": torch.ones(1, 1).bool()}, ValueError, "active must be (S) = (1), got (1, 1)"),
        (
            {"active": torch.ones(1, device="meta").bool()},
            TypeError,
            "active must be on cpu like the first tensor, got meta",
        ),
        ({"coefficients": None}, TypeError, "coefficients must be a list of (a, b, c), got NoneType"),
        ({"coefficients": []}, ValueError, "coefficients must be one (a, b, c) a step and at least one step, got none"),
        ({"coefficients": [(1, 2)]}, ValueError, "coefficients[0] must be three numbers (a, b, c), got (1, 2)"),
        ({"coefficients": [(1, 2, None)]}, TypeError, "coefficients[0].c must be a number, got NoneType"),
    ]
)
def test_bad_arguments(bad: Any) -> None:
    assert_refused(teon_update, good(), bad)
