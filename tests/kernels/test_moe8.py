"""`moe8`: against its composition of plain torch in float64, against `moe`, and kernels against the emulation."""

from typing import Any
from unittest import mock

import pytest
import torch
from moe8_support import Scales, cast, cast_weight, experts8
from oracle import EXPERTS_ERROR, assert_equal_to_float64, frobenius_error
from support import WITHOUT_SCHEMA, assert_refused, backends, bad_calls, checked_mode, device_of
from torch.nn.functional import cosine_similarity

from yaongi.kernels import moe, moe8, moe8_backward, quantize8, quantize_weight8, use_backend
from yaongi.kernels.backend import OPS
from yaongi.kernels.moe8 import op as moe8_op

Tensor = torch.Tensor
Results = dict[str, Tensor]
E4M3 = torch.float8_e4m3fn
SCALES = (32.0, 2.0, 16.0, 4.0)  # of x, A, the gradient of y, and dH
ROUTINGS = {  # T, D, F, E, K, and a change of the ids
    "usual": (37, 32, 48, 5, 2, None),
    "one token": (1, 16, 16, 5, 2, None),
    "no token": (0, 32, 48, 5, 2, None),
    "every expert a token": (7, 32, 16, 4, 4, None),
    "all on one expert": (20, 16, 48, 5, 1, lambda ids: ids * 0 + 3),
    "empty experts": (20, 32, 48, 7, 2, lambda ids: ids * 0 + torch.tensor([5, 1]).int()),
    "bad ids": (37, 32, 48, 5, 2, lambda ids: torch.where(ids == 1, -3, torch.where(ids == 4, 5, ids)).int()),
    "only bad ids": (16, 32, 48, 5, 2, lambda ids: ids - 100),
}


class Layer:
    """A layer's tensors, and the arguments of both ops made of them."""

    def __init__(
        self,
        T: int,
        D: int,
        F: int,
        E: int,
        K: int,
        change: Any = None,
        dtype: Any = torch.float64,
        device: str = "cpu",
    ) -> None:
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        wide = torch.promote_types(dtype, torch.float32)
        self.x, self.dy, self.residual, self.addend = (torch.randn(T, D, **like) for _ in range(4))
        self.w_up, self.w_down = torch.randn(E, F, D, **like) / D**0.5, torch.randn(E, D, F, **like) / F**0.5
        ids = torch.rand(T, E, device=device).argsort(-1)[:, :K].int()
        self.ids, self.g = change(ids) if change else ids, torch.rand(T, K, device=device, dtype=wide)
        self.scales = Scales(*torch.tensor(SCALES, device=device))
        self.sums = [torch.randn_like(w, dtype=wide) for w in (self.w_up, self.w_down)]
        self.amax = torch.zeros(3, device=device)  # of A and dH; the last is nobody's

    def _shared(self, transposed: bool) -> dict[str, Any]:
        named = {}
        for name, w in (("up", self.w_up), ("down", self.w_down)):
            w8, w8t, unit = quantize_weight8(w)
            named |= {f"w_{name}8t": w8t} if transposed else {f"w_{name}8": w8}
            named[f"unit_{name}"] = unit
        return named | {"expert_ids": self.ids, "expert_weights": self.g}

    def forward(self) -> dict[str, Any]:
        scales = self.scales
        x8, _ = quantize8(self.x, scales.x, self.amax[2])
        own = {"x8": x8, "unit_x": 1 / scales.x, "scale": scales.a, "amax": self.amax[0]}
        return self._shared(transposed=False) | own | {"residual": self.residual, "dtype": self.x.dtype}

    def backward(self, a8: Tensor) -> dict[str, Any]:
        scales = self.scales
        d8, _ = quantize8(self.dy, scales.d, self.amax[2])
        own = {"d8": d8, "unit_d": 1 / scales.d, "dy": self.dy, "x": self.x, "a8": a8, "unit_a": 1 / scales.a}
        own |= {"scale": scales.h, "amax": self.amax[1], "addend": self.addend}
        return self._shared(transposed=True) | own | dict(zip(("dw_up", "dw_down"), self.sums, strict=True))

    def run(self) -> Results:
        """All that both directions return and write."""
        y, a8 = moe8(**self.forward())
        dx, dg, dh8 = moe8_backward(**self.backward(a8))
        codes = {"a8": a8, "dh8": dh8, "amax_a": self.amax[0], "amax_h": self.amax[1]}
        return {"y": y, "dx": dx, "dg": dg, "dw_up": self.sums[0], "dw_down": self.sums[1]} | codes

    def by_autograd(self, function: Any) -> Results:
        """The same by autograd through a function of x, weights, ids and g."""
        leaves = [t.detach().requires_grad_() for t in (self.x, self.w_up, self.w_down, self.g)]
        y = function(*leaves[:3], self.ids, leaves[3])
        found = torch.autograd.grad(y, leaves, self.dy, materialize_grads=True)
        named = dict(zip(("dx", "dw_up", "dw_down", "dg"), found, strict=True)) | {"y": y.detach() + self.residual}
        named["dx"] = named["dx"] + self.addend
        return named | {f"dw_{n}": named[f"dw_{n}"] + t for n, t in zip(("up", "down"), self.sums, strict=True)}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_its_composition(routing: str) -> None:
    """In float64: y, and every gradient, those of the weights added to sums."""
    layer = Layer(*ROUTINGS[routing])
    expected = layer.by_autograd(lambda *arguments: experts8(*arguments, layer.scales))
    found = layer.run()
    for name, value in expected.items():
        assert_equal_to_float64(found[name], value, 1e-12, name)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_codes_lie_by_expert(routing: str) -> None:
    """A and dH, cast, and their largest magnitudes before the cast."""
    layer = Layer(*ROUTINGS[routing])
    found, scales, top_k = layer.run(), layer.scales, layer.ids.shape[1]
    pairs = [(e, p) for e in range(len(layer.w_up)) for p, i in enumerate(layer.ids.flatten().tolist()) if i == e]
    up, down, x, d = *map(cast_weight, (layer.w_up, layer.w_down)), cast(layer.x, scales.x), cast(layer.dy, scales.d)
    wanted: dict[str, list[Tensor]] = {"a": [], "h": []}
    for e, p in pairs:
        a = (up[e] @ x[p // top_k]).relu() ** 2
        wanted["a"].append(a)
        wanted["h"].append(2 * cast(a, scales.a).sqrt() * layer.g.flatten()[p] * (d[p // top_k] @ down[e]))
    for codes, amax, rows, scale in (("a8", "amax_a", "a", scales.a), ("dh8", "amax_h", "h", scales.h)):
        assert found[codes].shape == (layer.ids.numel(), layer.w_up.shape[1])
        if pairs:
            values = torch.stack(wanted[rows])
            assert_equal_to_float64(found[codes][: len(pairs)].double() / scale, cast(values, scale), 1e-12, codes)
            torch.testing.assert_close(found[amax], values.abs().max().float(), rtol=1e-6, atol=0)
        else:
            assert found[amax] == 0


def test_it_is_near_the_experts_without_casts() -> None:
    """A product of casts errs by 3.75e-2; here one follows the square of another."""
    layer = Layer(256, 128, 96, 6, 2)
    layer.sums = [torch.zeros_like(t) for t in layer.sums]
    layer.residual.zero_()
    layer.addend.zero_()
    exact, found = layer.by_autograd(moe), layer.run()
    assert frobenius_error(found["y"], exact["y"]) <= 7e-2
    for name in ("dx", "dw_up", "dw_down", "dg"):
        cosine = cosine_similarity(found[name].flatten(), exact[name].flatten(), dim=0)
        assert cosine >= 0.996, f"{name}: {cosine}"


@pytest.mark.parametrize("backend", backends("triton"))
def test_what_is_optional(backend: str) -> None:
    """Without residual, addend and sums the other results are what they were; a weight without a sum gets nothing."""
    layer = Layer(40, 32, 48, 4, 2, None, torch.bfloat16, device_of(backend, "moe8"))
    with use_backend(backend, op="moe8"):  # type: ignore[arg-type]
        forward = layer.forward()
        y, a8 = moe8(**forward | {"residual": torch.zeros_like(layer.x)})
        assert torch.equal(moe8(**forward | {"residual": None})[0], y)
        backward = layer.backward(a8) | {"addend": torch.zeros_like(layer.x)}
        dx, dg, _ = moe8_backward(**backward)
        both = [t.clone() for t in layer.sums]
        for left in ({"dw_up"}, {"dw_down"}, {"dw_up", "dw_down", "addend"}):
            layer.sums = [torch.randn_like(t) for t in both]
            before = [t.clone() for t in layer.sums]
            sums = dict(zip(("dw_up", "dw_down"), layer.sums, strict=True))
            again = moe8_backward(**backward | sums | dict.fromkeys(left))
            assert torch.equal(again[0], dx)
            assert torch.equal(again[1], dg)
            for name, total, start in zip(sums, layer.sums, before, strict=True):
                assert torch.equal(total, start) == (name in left)


@pytest.mark.parametrize("backend", backends("triton"))
def test_a_nan_reaches_amax_and_its_rows(backend: str) -> None:
    """And no other row: also where the tile that holds it has rows of no token."""
    layer = Layer(40, 32, 48, 4, 2, None, torch.bfloat16, device_of(backend, "moe8"))
    with use_backend(backend, op="moe8"):  # type: ignore[arg-type]
        forward = layer.forward()
        y, a8 = moe8(**forward)
        dx, dg, _ = moe8_backward(**layer.backward(a8))
        layer.amax.zero_()
        layer.x[7, 3] = layer.dy[9, 3] = torch.nan
        broken, _ = moe8(**layer.forward())
        back = moe8_backward(**layer.backward(a8))
    assert layer.amax[:2].isnan().all()
    for row, ours, clean in ((7, broken, y), (9, back[0], dx), (9, back[1], dg)):
        assert ours[row].isnan().all()
        others = torch.arange(40, device=ours.device) != row
        assert torch.equal(ours[others], clean[others])


@pytest.mark.parametrize("backend", backends("triton"))
def test_an_infinity_reaches_amax(backend: str) -> None:
    """The cast saturates, so it would be lost."""
    layer = Layer(40, 32, 48, 4, 2, None, torch.bfloat16, device_of(backend, "moe8"))
    with use_backend(backend, op="moe8"):  # type: ignore[arg-type]
        y, a8 = moe8(**layer.forward() | {"unit_x": torch.full_like(layer.amax[0], 1e30)})
        moe8_backward(**layer.backward(a8) | {"unit_d": torch.full_like(layer.amax[0], 3e38)})
    assert layer.amax[0].isinf()
    assert not layer.amax[1].isfinite()
    assert y.isfinite().all()


@pytest.mark.parametrize("backend", backends("triton"))
def test_zeros_stay_finite(backend: str) -> None:
    layer = Layer(20, 32, 48, 4, 2, None, torch.bfloat16, device_of(backend, "moe8"))
    layer.x.zero_()
    with use_backend(backend, op="moe8"):  # type: ignore[arg-type]
        found = layer.run()
    assert found["amax_a"] == found["amax_h"] == 0
    assert torch.equal(found["y"], layer.residual)
    assert torch.equal(found["dx"], layer.addend)
    assert not found["dg"].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (8192, 2048, 512, 64, 6, None),
        (1000, 2688, 1856, 16, 6, None),
        (777, 2048, 240, 8, 2, lambda ids: torch.where(ids == 1, -1, torch.where(ids == 2, 8, ids)).int()),
        (520, 768, 384, 8, 1, lambda ids: ids * 0 + 2),
        (16, 16, 16, 4, 4, None),
    ],
    ids=lambda shape: str(shape[:5]),
)
def test_kernels_equal_the_emulation(shape: Any, dtype: torch.dtype) -> None:
    """Relative Frobenius errors of all results; the largest magnitudes; the same bits in two runs."""
    layer = Layer(*shape, dtype, "cuda")
    starts, runs = [t.clone() for t in layer.sums], {}
    for name, backend in (("first", None), ("second", None), ("plain", "reference")):
        for total, start in zip(layer.sums, starts, strict=True):
            total.copy_(start)
        layer.amax.zero_()
        with use_backend(backend, op="moe8"):  # type: ignore[arg-type]
            runs[name] = {key: t.clone() for key, t in layer.run().items()}
    valid = int(((layer.ids >= 0) & (layer.ids < len(layer.w_up))).sum())
    for name, plain in runs["plain"].items():
        first, second = runs["first"][name], runs["second"][name]
        if name.endswith("8"):
            first, second, plain = (t[:valid].half() for t in (first, second, plain))
        assert torch.equal(first, second), name
        assert frobenius_error(first, plain) <= EXPERTS_ERROR, name


@pytest.mark.parametrize(("routing", "left"), [("usual", ()), ("no token", ("addend", "dw_up", "dw_down"))])
def test_opcheck(routing: str, left: tuple[str, ...]) -> None:
    layer, ops = Layer(*ROUTINGS[routing], torch.bfloat16), torch.ops.yaongi
    torch.library.opcheck(ops.moe8.default, (), layer.forward(), test_utils=WITHOUT_SCHEMA)
    backward = layer.backward(moe8(**layer.forward())[1]) | dict.fromkeys(left)
    torch.library.opcheck(ops.moe8_backward.default, (), backward, test_utils=WITHOUT_SCHEMA)


def test_what_triton_refuses() -> None:
    """GPUs without FP8, results of other widths, float64 anywhere, and no experts per token: the reference runs."""
    layer = Layer(4, 16, 32, 3, 2, None, torch.bfloat16)
    forward = layer.forward() | {"expert_ids": layer.ids, "residual": None}
    backward = layer.backward(moe8(**forward)[1])
    for name, arguments in (("moe8", forward), ("moe8_backward", backward)):
        op = OPS[name]
        wide = {"dtype": torch.float32} if name == "moe8" else {"dy": layer.dy.float()}
        changes: dict[str | None, dict[str, Any]] = {
            None: {},
            "its results are float16 or bfloat16, got float32": wide,
            "it takes no float64": {"expert_weights": layer.g.double()},
            "it takes K of 1 or more, got 0": {"expert_ids": layer.ids[:, :0]},
        }
        for reason in (None, "it needs compute capability 8.9 or newer, got (8, 6)"):
            with mock.patch.object(moe8_op, "refuses_gpu", return_value=reason):
                for wanted, change in changes.items():
                    given = [(arguments | change)[a.name] for a in op.overload._schema.arguments]
                    assert op.refuses["triton"](*given) == (reason or wanted)


def good() -> dict[str, Any]:
    return Layer(4, 16, 32, 3, 2, None, torch.float32).forward()


def codes(*shape: int) -> Tensor:
    return torch.ones(shape).to(E4M3)


@bad_calls(
    [
        ({"x8": torch.ones(4, 16)}, TypeError, "x8 must be float8_e4m3fn, got float32"),
        ({"x8": codes(4, 8)}, ValueError, "x8 must be (T, D) with D % 16 == 0, got (4, 8)"),
        ({"w_up8": codes(3, 24, 16)}, ValueError, "w_up8 must be (E, F, D) with F % 16 == 0, got (3, 24, 16)"),
        ({"w_up8": codes(3, 16, 16)}, ValueError, "w_down8 must be (E, D, F) = (3, 16, 16), got (3, 16, 32)"),
        ({"expert_ids": torch.zeros(4, 2)}, TypeError, "expert_ids must be int32, got float32"),
        ({"expert_weights": torch.ones(4, 3)}, ValueError, "expert_weights must be (T, K) = (4, 2), got (4, 3)"),
        ({"expert_weights": codes(4, 2)}, TypeError, "expert_weights must be float32 or float64, got float8_e4m3fn"),
        ({"unit_up": 1.0}, TypeError, "unit_up must be a tensor, got float"),
        ({"amax": torch.ones(1)}, ValueError, "amax must be (), got (1,)"),
        ({"residual": torch.ones(4, 32)}, ValueError, "residual must be (T, D) = (4, 16), got (4, 32)"),
        (
            {"dtype": torch.int32},
            ValueError,
            "dtype must be torch.float16 or torch.bfloat16 or torch.float32 or torch.float64, got torch.int32",
        ),
    ]
)
def test_bad_arguments(bad: Any) -> None:
    assert_refused(moe8, good(), bad)


@bad_calls(
    [
        ({"dy": torch.ones(4, 16).half()}, TypeError, "x must be float16, got float32"),
        ({"w_up8t": codes(3, 32, 16)}, ValueError, "w_up8t must be (E, D, F) = (E, 16, F), got (3, 32, 16)"),
        ({"a8": codes(4, 32)}, ValueError, "a8 must be (T·K, F) = (8, F), got (4, 32)"),
        ({"a8": codes(8, 16)}, ValueError, "a8 must be (T·K, F) = (T·K, 32), got (8, 16)"),
        ({"dw_up": torch.zeros(3, 32, 16).half()}, TypeError, "dw_up must be float32, got float16"),
        ({"dw_down": torch.zeros(3, 32, 16)}, ValueError, "dw_down must be (E, D, F) = (3, 16, 32), got (3, 32, 16)"),
        ({"dw_down": torch.zeros(3, 32, 16).mT}, ValueError, "dw_down must be contiguous, got strides (512, 1, 16)"),
    ]
)
def test_bad_arguments_of_the_backward(bad: Any) -> None:
    layer = Layer(4, 16, 32, 3, 2, None, torch.float32)
    assert_refused(moe8_backward, layer.backward(moe8(**layer.forward())[1]), bad)


def test_checked_mode() -> None:
    arguments = good()
    with checked_mode():
        moe8(**arguments)
        with pytest.raises(ValueError, match=r"^moe8: expert_ids must be 0 to 2 \(E - 1\), or -1 for none, got 3$"):
            moe8(**arguments | {"expert_ids": torch.tensor([[0, 3]] * 4).int()})
        with pytest.raises(ValueError, match=r"^moe8: expert_weights must be finite, got 8 non-finite values$"):
            moe8(**arguments | {"expert_weights": torch.full((4, 2), torch.nan)})
