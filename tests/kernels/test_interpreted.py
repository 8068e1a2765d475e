"""Triton kernels in the interpreter, on tiny fp32 shapes: indexing, masks and boundaries, without a GPU."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import assert_equal_to_float64

from yaongi.kernels.backend import addressable
from yaongi.kernels.causal_conv1d import reference
from yaongi.kernels.cross_entropy import reference as cross_entropy_reference
from yaongi.kernels.mamba_scan import reference as mamba_reference
from yaongi.kernels.moe import reference as moe_reference
from yaongi.kernels.newton_schulz import reference as newton_schulz_reference
from yaongi.kernels.newton_schulz.op import POLAR_EXPRESS
from yaongi.kernels.rms_norm import reference as norm_reference

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize(("H", "J", "D", "places"), [(4, 1, 16, [37, 0]), (6, 2, 9, [5, 12]), (2, 2, 64, [130, 3])])
def test_attention_step(H: int, J: int, D: int, places: list[int]) -> None:
    """Several tiles of keys, heads that don't fill a tile, padding on the left that holds NaN, and places beyond."""
    from yaongi.kernels.attention_step import cached_attention
    from yaongi.kernels.attention_step import reference as attention_reference

    B, S, place = 2, 140, torch.tensor(places)
    q, k, v, keys, values = (torch.randn(B, *shape) for shape in ((H, D), (J, D), (J, D), (J, S, D), (J, S, D)))
    visible = (torch.arange(S) <= place[:, None]) & (torch.arange(S) >= torch.tensor([[2], [0]]))
    cache = [keys.double(), values.double()]
    wanted = attention_reference.attention_step_reference(*wide((q, k, v)), *cache, visible, place, 136)
    keys[0, :, :2] = values[0, :, 0] = keys[:, :, 138:] = torch.nan
    y = cached_attention.attention_step_triton(q, k, v, keys, values, visible, place, 136)
    assert_equal_to_float64(y, wanted, 1e-5)
    for row, end in enumerate(places):
        assert torch.equal(keys[row, :, end], k[row])
        assert torch.equal(values[row, :, end], v[row])


def causal_conv1d_cases() -> list[Any]:
    """Return shapes around the strip's length, with every combination of documents, states and activation."""
    shapes = [(2, 21, 40, 4), (1, 1, 8, 4), (2, 2, 260, 3), (1, 9, 16, 2)]
    return list(itertools.product(shapes, (False, True), (False, True), ("silu", None)))


@pytest.mark.parametrize(("shape", "documents", "state", "activation"), causal_conv1d_cases())
def test_causal_conv1d(shape: tuple[int, int, int, int], documents: bool, state: bool, activation: str | None) -> None:
    """Both directions equal the reference in float64, on a slice of a wider tensor."""
    from yaongi.kernels.causal_conv1d import conv_backward, conv_forward

    batch, length, channels, taps = shape
    x = torch.randn(batch, length, channels + 24)[..., 8 : 8 + channels]
    weight, bias = torch.randn(channels, taps), torch.randn(channels) if state else None
    ids = (torch.rand(batch, length) < 0.3).cumsum(1).int() if documents else None
    initial = torch.randn(batch, channels, taps - 1) if state else None
    dy, dfinal = torch.randn(batch, length, channels), torch.randn(batch, channels, taps - 1) if state else None
    inputs = (x, weight, bias, ids, initial, activation)
    wide = tuple(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs)
    actual = (
        *conv_forward.causal_conv1d_triton(*inputs, state),
        *conv_backward.causal_conv1d_backward_triton(dy, dfinal, *inputs),
    )
    exact = (
        *reference.causal_conv1d_reference(*wide, state),
        *reference.causal_conv1d_backward_reference(dy.double(), None if dfinal is None else dfinal.double(), *wide),
    )
    for i, (ours, expected) in enumerate(zip(actual, exact, strict=True)):
        assert_equal_to_float64(ours, expected, 1e-5, f"result {i}")


@pytest.mark.parametrize("steps", [None, [5, 0, -1]])
@pytest.mark.parametrize(("width", "activation", "bias"), [(4, "silu", True), (3, None, False), (2, "silu", True)])
def test_causal_conv1d_step(width: int, activation: str | None, bias: bool, steps: list[int] | None) -> None:
    """Two blocks of channels, x from a slice, a state with gaps, and three convolutions that take turns."""
    from yaongi.kernels.causal_conv1d import step

    phases = () if steps is None else (3,)
    x, state = torch.randn(3, 320)[:, 8:308], torch.randn(3, *phases, 300, width + 4)[..., : width - 1]
    turns = None if steps is None else torch.tensor(steps)
    inputs = (torch.randn(300, width), torch.randn(300) if bias else None, activation, turns)
    exact_state = state.double()
    y = step.causal_conv1d_step_triton(x, state, *inputs)
    exact = reference.causal_conv1d_step_reference(x.double(), exact_state, *wide(inputs))
    assert_equal_to_float64(y, exact, 1e-6, "y")
    assert torch.equal(state.double(), exact_state)


@pytest.mark.parametrize("shape", [(1, 528, 70), (3, 5, 64), (1, 1, 1), (2, 129, 33), (2, 0, 5)], ids=str)
def test_column_sums(shape: tuple[int, int, int]) -> None:
    """No rows, fewer and more rows than a block, and columns that don't fill the last block."""
    from yaongi.kernels.common.column_sums import column_sums

    partial = torch.randn(shape)
    assert_equal_to_float64(column_sums(partial), partial.double().sum(1), 1e-5)


@pytest.mark.parametrize(("T", "V"), [(3, 7), (2, 4096), (5, 9001), (1, 1)])
def test_cross_entropy(T: int, V: int) -> None:
    """Both directions, with logits in a wider tensor, rows without a target, and a row whose first block is −∞."""
    from yaongi.kernels.cross_entropy import loss_kernels

    logits, targets = 9 * torch.randn(T, V + 8)[:, :V], torch.randint(-1, V, (T,))
    targets[0] = V - 1
    logits[0, : V - 1] = -torch.inf
    dlosses, dnormalizers = torch.randn(T), torch.randn(T)
    results = loss_kernels.cross_entropy_triton(logits, targets)
    exact = cross_entropy_reference.cross_entropy_reference(logits.double(), targets)
    for name, ours, wanted in zip(("losses", "normalizers"), results, exact, strict=True):
        assert_equal_to_float64(ours, wanted, 1e-6, name)
    dlogits = loss_kernels.cross_entropy_backward_triton(dlosses, dnormalizers, logits, targets, results[1])
    doubles = (t.double() for t in (dlosses, dnormalizers, logits))
    wanted = cross_entropy_reference.cross_entropy_backward_reference(*doubles, targets, exact[1])
    assert_equal_to_float64(dlogits, wanted, 1e-5)


@pytest.mark.parametrize(
    ("T", "D", "N"), [(1, 512, 32), (1, 9000, 7), (3, 512, 32), (5, 272, 40), (16, 24, 7), (0, 8, 8)]
)
@pytest.mark.parametrize("addend", [False, True])
def test_linear_step(T: int, D: int, N: int, addend: bool) -> None:
    """Even and uneven blocks, x and the addend from slices."""
    from yaongi.kernels.linear_step import few_rows_linear
    from yaongi.kernels.linear_step import reference as linear_reference

    x, weight = torch.randn(T, D + 8)[:, 8:], torch.randn(N, D)
    inputs = (x, weight, torch.randn(T, N + 3)[:, :N] if addend else None)
    for activation in (None, "squared_relu"):
        exact = linear_reference.linear_step_reference(*wide(inputs), activation, False, True)
        assert_equal_to_float64(few_rows_linear.linear_step_triton(*inputs, activation, False, True), exact, 1e-5)


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("widths", [(32, 16), (130, 1, 7), (64, 64, 64, 5)])
def test_linear_steps(widths: tuple[int, ...], T: int) -> None:
    """Blocks of each weight that fill its rows and that don't, and a second launch for a fourth weight."""
    from yaongi.kernels.linear_step import few_rows_linear

    x, weights = torch.randn(T, 528)[:, 16:], [torch.randn(width, 512) for width in widths]
    ys = few_rows_linear.linear_steps_triton(x, weights, True)
    for y, weight in zip(ys, weights, strict=True):
        assert_equal_to_float64(y, x.double() @ weight.double().T, 1e-5)


@pytest.mark.parametrize("V", [1, 1000, 2500])
def test_likeliest(V: int) -> None:
    """A part that isn't full, equal logits in several parts, and rows of which none or not all are finite."""
    from yaongi.kernels.likeliest import reference as likeliest_reference
    from yaongi.kernels.likeliest import two_stages

    logits = torch.randn(7, V + 8).round()[:, 4 : V + 4]
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        logits[row, V // 2] = value
    logits[3], logits[4, V // 2 :], logits[5] = -torch.inf, 5.0, -7.0
    logits[6], logits[6, V // 2 :] = -0.0, 0.0
    assert torch.equal(two_stages.likeliest_triton(logits), likeliest_reference.likeliest_reference(logits))


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(5, 8, 2), (137, 64, 6), (3, 3, 3), (20, 130, 16), (1, 8, 3)])
def test_moe_route_and_dispatch(tokens: int, experts: int, top_k: int) -> None:
    """Routing makes the same choice, ties included; dispatch sorts pairs stably by expert and skips bad ids."""
    from yaongi.kernels.moe import dispatch, routing

    logits, bias = torch.randn(tokens, experts), torch.zeros(experts)
    logits[tokens // 3] = logits[tokens // 3, 0]
    ids, weights, load = routing.moe_route_triton(logits, bias, top_k, 2.5)
    expected = moe_reference.moe_route_reference(logits, bias, top_k, 2.5)
    assert torch.equal(ids, expected[0])
    assert torch.equal(load, expected[2])
    assert_equal_to_float64(weights, expected[1], 1e-6)
    dweights = torch.randn(tokens, top_k)
    dlogits = routing.moe_route_backward_triton(dweights, logits, ids, 2.5)
    assert_equal_to_float64(dlogits, moe_reference.moe_route_backward_reference(dweights, logits, ids, 2.5), 1e-6)
    ids[0, 0], ids[tokens // 2, 1] = -1, experts + 5
    plan, pairs = dispatch.dispatch(ids, experts), ids.flatten()
    key = torch.where((pairs >= 0) & (pairs < experts), pairs, experts)
    order, counts = key.argsort(stable=True), torch.bincount(key, minlength=experts + 1)[:experts]
    valid = int(counts.sum())
    assert torch.equal(plan.order[:valid], order[:valid].int())
    assert torch.equal(plan.row[order[:valid]], torch.arange(valid).int())
    assert bool((plan.row[order[valid:]] == -1).all())
    assert torch.equal(plan.offset[1:], counts.cumsum(0).int())
    assert torch.equal(plan.tile_end, ((counts + 127) // 128).cumsum(0).int())


@pytest.mark.parametrize(
    ("T", "D", "F", "E", "K", "bad"),
    [
        (1, 48, 32, 8, 3, False),
        (3, 272, 40, 64, 2, True),
        (16, 24, 80, 8, 2, True),
        (20, 16, 16, 1, 1, False),
        (3, 16, 16, 4, 4, False),
    ],
)
def test_moe_few(T: int, D: int, F: int, E: int, K: int, bad: bool) -> None:
    """Slots by pair and by expert, several tiles of rows, columns and inner elements, empty experts, and bad ids."""
    from yaongi.kernels.moe import few_tokens

    x, w_up, w_down = torch.randn(T, D + 8)[:, 4 : D + 4], torch.randn(E, F, D), torch.randn(E, D, F)
    ids, weights = torch.rand(T, E).argsort(-1)[:, :K].int(), torch.rand(T, K)
    if bad:
        ids[0, 0], ids[-1, -1], ids[T // 2] = -1, E + 3, ids[T // 2, 0].item()
    y, a = few_tokens.moe_few_triton(x, w_up, w_down, ids, weights)
    exact, rows = moe_reference.moe_reference(*wide((x, w_up, w_down)), ids, weights.double())
    valid = int(((ids >= 0) & (ids < E)).sum())
    assert_equal_to_float64(y, exact, 1e-5)
    assert_equal_to_float64(a[:valid], rows[:valid], 1e-5)


@pytest.mark.parametrize(
    ("T", "D", "F", "S", "E", "K"), [(1, 24, 40, 72, 8, 3), (2, 72, 8, 24, 3, 2), (2, 8, 16, 3, 3, 3)]
)
def test_moe_step(monkeypatch: pytest.MonkeyPatch, T: int, D: int, F: int, S: int, E: int, K: int) -> None:
    """Several tiles of rows and inner elements, x from a slice, and bad ids, whose weights may be anything."""
    from yaongi.kernels.moe_step import reference, token_experts

    for table in ("UP", "DOWN"):
        monkeypatch.setattr(token_experts, table, replace(getattr(token_experts, table), block_k=32))
    x, weights = torch.randn(T, D + 8)[:, 4 : D + 4], torch.rand(T, K)
    matrices = [torch.randn(E, F, D), torch.randn(E, D, F), torch.randn(S, D), torch.randn(D, S)]
    ids = torch.rand(T, E).argsort(-1)[:, :K].int()
    ids[0, 0], ids[-1, -1], weights[0, 0] = -1, E + 3 * (T > 1), torch.nan
    y = token_experts.moe_step_triton(x, *matrices, ids, weights, True)
    exact = reference.moe_step_reference(*wide((x, *matrices)), ids, weights.double(), True)
    assert_equal_to_float64(y, exact, 1e-5)


FLAT = [value for step in POLAR_EXPRESS for value in step]


@pytest.fixture
def newton_schulz_in_float32() -> Iterator[Any]:
    """Yield the launchers of both ops, patched to store in float32 instead of 16 bits, with small batches."""
    from yaongi.kernels.newton_schulz import passes, teon

    float32 = {"STORAGE": torch.float32, "WORKSPACE": 1000}
    with mock.patch.multiple(passes, **float32), mock.patch.object(teon, "DIRECTION", torch.float32):
        yield passes.newton_schulz_triton, teon.teon_update_triton


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 20), (3, 20, 5), (1, 8, 24), (1, 70, 9), (2, 9, 530)], ids=str)
@pytest.mark.parametrize("form", ["gram", "standard"])
def test_newton_schulz(shape: tuple[int, ...], form: str, newton_schulz_in_float32: Any) -> None:
    """Padding, transposition, several tiles and several batches."""
    x = torch.randn(shape)
    exact = newton_schulz_reference.newton_schulz_reference(x.double(), FLAT, form)
    assert_equal_to_float64(newton_schulz_in_float32[0](x, FLAT, form), exact, 2e-4)


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize(("stack", "shape"), [(1, (2, 9, 12)), (2, (3, 9, 6)), (2, (20, 3)), (4, (3, 30))], ids=str)
def test_teon_update(
    stack: int, shape: tuple[int, ...], masters: bool, idle: bool, newton_schulz_in_float32: Any
) -> None:
    """Every tensor is updated in place, with the layers of a stack side by side; matrices may be left alone."""
    lists = [[torch.randn(shape) for _ in range(4)] for _ in range(4 if masters else 3)] + ([] if masters else [[]])
    exact = [[t.double() for t in tensors] for tensors in lists]
    active = torch.rand(4 // stack, *shape[:-2]) < 0.5 if idle else None
    settings = (stack, 0.5, 0.9, True, 0.1, FLAT, active)
    newton_schulz_reference.teon_update_reference(*exact, *settings)
    newton_schulz_in_float32[1](*lists, *settings)
    for ours, expected in zip(lists, exact, strict=True):
        for tensor, wanted in zip(ours, expected, strict=True):
            assert_equal_to_float64(tensor, wanted, 2e-4)


def wide(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the same arguments in float64."""
    return tuple(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs)


def mamba_inputs(B: int, L: int, H: int, P: int, G: int, N: int, documents: bool, optional: bool) -> tuple[Any, ...]:
    """Return arguments of a scan as its op hands them on; x, b and c are slices of one tensor."""
    packed = torch.randn(B, L, H * P + 2 * G * N)
    x, b, c = packed.split([H * P, G * N, G * N], dim=-1)
    ids = (torch.rand(B, L) < 0.1).cumsum(1).int() if documents else None
    parameters = (
        (torch.randn(H), torch.randn(H) - 1, ids, torch.randn(B, H, P, N)) if optional else (None, None, ids, None)
    )
    A = -(2 * torch.rand(H)).exp()
    return (
        addressable(x.unflatten(-1, (H, P))),
        torch.randn(B, L, H),
        A,
        addressable(b.unflatten(-1, (G, N))),
        addressable(c.unflatten(-1, (G, N))),
        *parameters,
    )


@pytest.mark.parametrize(
    ("shape", "documents", "optional", "slots", "states_bytes"),
    [
        ((1, 1, 2, 8, 1, 16), False, True, 1, 1e9),
        ((2, 35, 4, 8, 2, 16), True, True, 1, 1e9),
        ((1, 33, 2, 40, 1, 24), False, False, 1, 1e9),  # two blocks of P
        ((1, 270, 2, 8, 1, 16), True, True, 16, 1e9),  # several segments
        ((1, 20, 4, 8, 2, 16), True, True, 1, 1.0),  # one head per slice
    ],
)
def test_mamba_scan(
    shape: tuple[int, ...],
    documents: bool,
    optional: bool,
    slots: int,
    states_bytes: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both directions equal the reference in float64."""
    from yaongi.kernels.mamba_scan import decays, scan_forward
    from yaongi.kernels.mamba_scan import scan_backward as backwards

    monkeypatch.setattr(decays, "RESIDENT_PROGRAMS", slots)
    monkeypatch.setattr(backwards, "STATES_BYTES", states_bytes)
    inputs = mamba_inputs(*shape, documents, optional)
    outputs = scan_forward.mamba_scan_triton(*inputs, True)
    gradients = tuple(torch.randn_like(t) for t in outputs)
    actual = (*outputs, *backwards.mamba_scan_backward_triton(*gradients, *inputs))
    exact = (
        *mamba_reference.mamba_scan_reference(*wide(inputs), True),
        *mamba_reference.mamba_scan_backward_reference(*wide(gradients), *wide(inputs)),
    )
    for i, (ours, expected) in enumerate(zip(actual, exact, strict=True)):
        assert_equal_to_float64(ours, expected, 2e-5, f"result {i}")


@pytest.mark.parametrize("A", [-1e-8, -1.0, -1e3])
@pytest.mark.parametrize("dt", [-200.0, -110.0, -100.0, -90.0, -80.0, 1e4])
def test_mamba_scan_at_the_ends_of_float32(dt: float, A: float) -> None:
    """With denormal or zero step sizes, or decays that underflow, results are finite and right, also with documents."""
    from yaongi.kernels.mamba_scan import scan_backward as backwards
    from yaongi.kernels.mamba_scan import scan_forward

    inputs = list(mamba_inputs(1, 20, 2, 8, 1, 16, True, True))
    inputs[1] = torch.where(torch.rand(1, 20, 2) < 0.5, dt, inputs[1])
    inputs[2] = torch.full((2,), A)
    outputs = scan_forward.mamba_scan_triton(*inputs, True)
    gradients = tuple(torch.randn_like(t) for t in outputs)
    actual = (*outputs, *backwards.mamba_scan_backward_triton(*gradients, *inputs))
    exact = (
        *mamba_reference.mamba_scan_reference(*wide(tuple(inputs)), True),
        *mamba_reference.mamba_scan_backward_reference(*wide(gradients), *wide(tuple(inputs))),
    )
    for i, (ours, expected) in enumerate(zip(actual, exact, strict=True)):
        assert_equal_to_float64(ours, expected, 1e-4, f"result {i}")  # tiny decays


@pytest.mark.parametrize(
    ("broken", "token", "L", "states_bytes"),
    [
        *itertools.product(("x", "dt", "b", "c", "dy"), (29, 31), (44,), (1e9,)),
        *(
            ("state", 0, 44, 1e9),
            ("dfinal", 43, 44, 1e9),
            ("x", 29, 44, 1.0),
            ("dt", 31, 260, 1e9),
            ("dy", 29, 260, 1e9),
        ),
    ],
)
def test_what_is_not_finite_stays_in_its_document(
    broken: str, token: int, L: int, states_bytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the first or the last of three documents; one segment or two (L 260); heads in slices (1.0) or not."""
    from yaongi.kernels.mamba_scan import decays
    from yaongi.kernels.mamba_scan import scan_backward as backwards

    monkeypatch.setattr(decays, "RESIDENT_PROGRAMS", 9999)
    monkeypatch.setattr(backwards, "STATES_BYTES", states_bytes)
    inputs = list(mamba_inputs(1, L, 2, 8, 1, 16, True, True))
    ids = inputs[7] = torch.tensor([[0] * 30 + [1] + [2] * (L - 31)], dtype=torch.int32)
    gradients = [torch.randn(1, L, 2, 8), torch.randn(1, 2, 8, 16)]
    clean = run_mamba_scan(inputs, gradients)
    if broken in ("state", "dfinal"):
        (inputs[8] if broken == "state" else gradients[1])[0, 1, 3, 5] = torch.nan
    else:
        target = {"x": inputs[0], "dt": inputs[1], "b": inputs[3], "c": inputs[4], "dy": gradients[0]}[broken]
        target[0, token].view(-1)[-1] = torch.nan
    changed = run_mamba_scan(inputs, gradients)
    others = ids[0] != ids[0, token]
    lost = False
    for name in ("y", "dx", "ddt", "db", "dc"):
        lost |= not changed[name].isfinite().all()
        torch.testing.assert_close(changed[name][:, others], clean[name][:, others], rtol=1e-5, atol=1e-5)
    assert lost
    assert changed["final"].isfinite().all() or ids[0, token] == 2
    assert changed["dstate"].isfinite().all() or ids[0, token] == 0
    assert changed["dA"].isfinite().tolist() == ([False, False] if broken in ("b", "c") else [True, False])


def run_mamba_scan(inputs: list[Any], gradients: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The results of both directions, by name."""
    from yaongi.kernels.mamba_scan import scan_backward, scan_forward

    outputs = scan_forward.mamba_scan_triton(*inputs, True)
    results = scan_backward.mamba_scan_backward_triton(*gradients, *inputs)
    names = ("y", "final", "dx", "ddt", "dA", "db", "dc", "dD", "dbias", "dstate")
    return dict(zip(names, (*outputs, *results), strict=True))


@pytest.mark.parametrize("optional", [False, True])
def test_mamba_step(optional: bool) -> None:
    """One token, from slices, into a transposed state."""
    from yaongi.kernels.mamba_scan import decode

    x, dt, A, b, c, D, dt_bias, _, _ = mamba_inputs(3, 1, 4, 5, 2, 6, False, optional)
    inputs = (x[:, 0], dt[:, 0], A, b[:, 0], c[:, 0], D, dt_bias)
    state = torch.randn(3, 4, 6, 5).mT
    exact_state = state.double()
    y = decode.mamba_step_triton(state, *inputs)
    assert_equal_to_float64(y, mamba_reference.mamba_step_reference(exact_state, *wide(inputs)), 1e-5, "y")
    assert_equal_to_float64(state, exact_state, 1e-5, "state")


@pytest.mark.parametrize(("shape", "groups"), [((3, 4, 8), 2), ((5, 6), 6), ((7,), 1), ((70, 96), 3)])
def test_norm(shape: tuple[int, ...], groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both norms in both directions, with more rows than a program's block."""
    from yaongi.kernels.rms_norm import norm_kernels

    monkeypatch.setattr(norm_kernels, "PROGRAMS", 2)
    x, z, dy, dsum = (torch.randn(*shape[:-1], shape[-1] + 8)[..., 4:-4] for _ in range(4))
    weight = torch.randn(shape[-1])
    calls = {
        "rms_norm": (x, weight, z, 1e-3),
        "rms_norm_backward": (dy, dsum, x, weight, 1e-3),
        "gated_rms_norm": (x, z, weight, 1e-3, groups),
        "gated_rms_norm_backward": (dy, x, z, weight, 1e-3, groups),
    }
    for name, inputs in calls.items():
        actual = getattr(norm_kernels, f"{name}_triton")(*inputs)
        exact = getattr(norm_reference, f"{name}_reference")(*wide(inputs))
        pairs = zip(actual, exact, strict=True) if isinstance(actual, tuple) else [(actual, exact)]
        for i, (ours, expected) in enumerate(pairs):
            assert_equal_to_float64(ours, expected, 1e-5, f"{name} {i}")


@pytest.mark.parametrize("documents", [False, True])
def test_mamba_core(documents: bool) -> None:
    """Gradients, written into slices of dprojected, equal those of the references in float64."""
    from yaongi.kernels.mamba_core import combined, reference

    B, L, H, P, G, N = 2, 20, 4, 8, 2, 16
    channels = H * P + 2 * G * N
    ids = (torch.rand(B, L) < 0.1).cumsum(1).int() if documents else None
    per_head, taps, taps_bias = torch.randn(3, H), torch.randn(channels, 4), torch.randn(channels)
    parameters = (taps, taps_bias, -per_head[0].exp(), per_head[1], per_head[2] - 1, torch.randn(H * P))
    inputs = (torch.randn(B, L, H * P + channels + H), *parameters, ids, G, 1e-3)
    outputs, exact = combined.mamba_core_triton(*inputs), reference.mamba_core_reference(*wide(inputs))
    dy = torch.randn_like(outputs[0])
    outputs += combined.mamba_core_backward_triton(dy, *outputs[1:], *inputs)
    exact += reference.mamba_core_backward_reference(dy.double(), *exact[1:], *wide(inputs))
    for i, (ours, expected) in enumerate(zip(outputs, exact, strict=True)):
        assert_equal_to_float64(ours, expected, 1e-5, f"result {i}")
