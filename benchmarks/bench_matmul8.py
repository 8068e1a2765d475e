"""FP8 linear layers at the flagship's shapes: products, casts, and a whole layer, against bf16, torch and te.Linear.

`pytest benchmarks/bench_matmul8.py --benchmark-only -s` prints a table, and the averages over all dense products of
`yaongi-4b`. Weights are cast once per optimizer step, so nobody's time holds that.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from measure import Absent, Compare, Peer, Work, interleaved_ms, recorded, report
from oracle import BFLOAT16_PRODUCT_ERROR, PRODUCT_ERRORS, frobenius_error
from torch.nn import functional as F

from yaongi.kernels import (
    matmul8,
    matmul8_add,
    quantize8,
    quantize_weight8,
    rms_norm,
    rms_norm8,
    rms_norm8_backward,
    squared_relu8,
    squared_relu8_backward,
    transpose8,
    use_backend,
)

Tensor = torch.Tensor
E4M3 = torch.float8_e4m3fn
T = 8192
LAYERS = {  # outputs, inputs, and how many of them yaongi-4b has; without its first and last layer, which stay bf16
    "in_proj": (10240, 2048, 21),
    "out_proj": (2048, 4096, 21),
    "qkv": (3072, 2048, 8),
    "o_proj": (2048, 2048, 8),
    "shared up": (1024, 2048, 21),
    "shared down": (2048, 1024, 21),
}
PRODUCTS = ("forward", "input gradient", "weight gradient")
DIRECTIONS = {"forward": 1, "x alone": 2, "both": 3}  # products of a layer, forwards and with which gradients
SCALE = 16.0


def scalar(value: float) -> Tensor:
    return torch.tensor(value, device="cuda")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def sizes(layer: str, product: str) -> tuple[int, int, int]:
    """Return M, N and K of a product of a layer."""
    outputs, inputs, _ = LAYERS[layer]
    return {
        "forward": (T, outputs, inputs),
        "input gradient": (T, inputs, outputs),
        "weight gradient": (outputs, inputs, T),
    }[product]


@contextlib.contextmanager
def products_in_cuda() -> Iterator[None]:
    """Let no product take another backend silently."""
    with use_backend("cuda", op="matmul8"), use_backend("cuda", op="matmul8_add"):
        yield


def product_call(layer: str, product: str, exact: bool = True) -> tuple[Callable[[], Any], dict[str, Peer]]:
    """Return one product of ours, its result checked, and the peers' products of the same shape."""
    M, N, K = sizes(layer, product)
    a, b = randn(M, K), randn(N, K)
    unit, scale = scalar(1 / SCALE), scalar(SCALE)
    (a8, _), (b8, _) = (quantize8(t, scale, scalar(0.0)) for t in (a, b))
    some = torch.arange(0, M, 97, device="cuda")
    wanted = (a8[some].double() @ b8.double().T) / SCALE**2
    total = torch.zeros(M, N, device="cuda")
    scaled = {"out_dtype": torch.bfloat16, "use_fast_accum": not exact}
    peers: dict[str, Peer] = {"_scaled_mm": lambda: torch._scaled_mm(a8, b8.T, unit, unit, **scaled)}
    if product == "weight gradient":
        matmul8_add(a8, b8, unit, unit, total, exact=exact)
        assert frobenius_error(total[some], wanted) <= PRODUCT_ERRORS[exact]["zero mean"]
        at = a.T.contiguous()  # (tokens, outputs), as a bf16 backward pass has it
        bt = b.T.contiguous()
        peers["bf16"] = lambda: torch.addmm(total, at.T, bt, out_dtype=torch.float32, out=total)
        wide = {"out_dtype": torch.float32, "use_fast_accum": not exact}
        peers["_scaled_mm"] = lambda: total.add_(torch._scaled_mm(a8, b8.T, unit, unit, **wide))
        return lambda: matmul8_add(a8, b8, unit, unit, total, exact=exact), peers
    bound = max(BFLOAT16_PRODUCT_ERROR, PRODUCT_ERRORS[exact]["zero mean"])
    assert frobenius_error(matmul8(a8, b8, unit, unit, exact=exact)[some], wanted) <= bound
    peers["bf16"] = lambda: torch.mm(a, b.T)
    return lambda: matmul8(a8, b8, unit, unit, exact=exact), peers


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_product(layer: str, product: str, exact: bool, compare: Compare) -> None:
    """Time one product, operands in FP8 already."""
    M, N, K = sizes(layer, product)
    ours, peers = product_call(layer, product, exact)
    with products_in_cuda():
        compare(ours, Work(2.0 * M * N * K, kind="fp8"), peers)


def test_all_products(benchmark: Any, request: pytest.FixtureRequest, l2_flush: Callable[[], Any]) -> None:
    """Average TFLOP/s over all dense products of yaongi-4b, alone and with the byte transposes that they need.

    A forward product's operand comes transposed by `transpose8` in the backward pass; so does a gradient. All are timed
    as CUDA graphs, as the trainer runs them: the host needs longer to launch a small product than the GPU to compute.
    """
    flops = product_ms = transpose_ms = 0.0
    for layer, (outputs, inputs, count) in LAYERS.items():
        for product in PRODUCTS:
            M, N, K = sizes(layer, product)
            with products_in_cuda():
                product_ms += count * interleaved_ms({"": recorded(product_call(layer, product)[0])}, l2_flush)[""]
            flops += count * 2.0 * M * N * K
        for width in (outputs, inputs):
            x8 = randn(T, width).to(E4M3)
            transpose_ms += count * interleaved_ms({"": recorded(lambda x8=x8: transpose8(x8))}, l2_flush)[""]
    alone, both = flops / product_ms / 1e9, flops / (product_ms + transpose_ms) / 1e9
    info = {"products_ms": product_ms, "transposes_ms": transpose_ms, "tflops": alone, "with_transposes_tflops": both}
    report(benchmark, request, info)


@pytest.mark.parametrize("width", [10304, 4096, 3072, 2048, 1024])
def test_transpose8(width: int, compare: Compare) -> None:
    """Time the byte transpose against a copy of the same bytes, and torch's own."""
    x8 = randn(T, width).to(E4M3)
    assert torch.equal(transpose8(x8).view(torch.uint8), x8.view(torch.uint8).T)
    out = torch.empty_like(x8)
    peers: dict[str, Peer] = {
        "torch": lambda: x8.view(torch.uint8).T.contiguous(),
        "copy": lambda: out.view(torch.uint8).copy_(x8.view(torch.uint8)),
    }
    compare(lambda: transpose8(x8), Work(0.0, 2.0 * T * width), peers)


@pytest.mark.parametrize("cast", ["quantize8", "quantize8 both", "squared_relu8", "squared_relu8_backward"])
def test_cast(cast: str, compare: Compare) -> None:
    """Time the elementwise casts of (8192, 3072), against torch.compile without the transposes and amax."""
    x, da = randn(T, 3072), randn(T, 3072)
    scale, unit, amax = scalar(SCALE), scalar(1 / SCALE), scalar(0.0)
    a8 = squared_relu8(x, scale, amax)[0]

    def saturated(values: Tensor) -> Tensor:
        return (values * scale).clamp(-448, 448).to(E4M3)

    calls: dict[str, tuple[Callable[[], Any], Callable[..., Tensor], tuple[Tensor, ...], float]] = {
        "quantize8": (lambda: quantize8(x, scale, amax), lambda x: saturated(x.float()), (x,), 3),
        "quantize8 both": (
            lambda: quantize8(x, scale, amax, row=True, column=True),
            lambda x: saturated(x.float()),
            (x,),
            5,
        ),
        "squared_relu8": (
            lambda: squared_relu8(x, scale, amax),
            lambda x: saturated(x.float().relu().square()),
            (x,),
            5,
        ),
        "squared_relu8_backward": (
            lambda: squared_relu8_backward(da, a8, unit, scale, amax),
            lambda da, a8: saturated(2 * (a8.float() * unit).sqrt() * da.float()),
            (da, a8),
            6,
        ),
    }
    ours, plain, inputs, bytes_per_element = calls[cast]
    compiled = torch.compile(plain)
    compare(ours, Work(0.0, bytes_per_element * x.numel()), {"compiled": lambda: compiled(*inputs)})


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_rms_norm8(direction: str, compare: Compare) -> None:
    """Time the norm that writes FP8, against the bf16 norm and a cast, and the transposes, of its result."""
    x, dy, extra, weight = randn(T, 2048), randn(T, 2048), randn(T, 2048), randn(2048)
    scale, amax = scalar(SCALE), scalar(0.0)
    _, _, inverse_rms = rms_norm8(x, weight, 1e-5, scale, amax)
    leaf = x.clone().requires_grad_()
    y = rms_norm(leaf, weight, 1e-5)
    if direction == "forward":
        peers: dict[str, Peer] = {"norm and cast": lambda: quantize8(rms_norm(x, weight, 1e-5), scale, amax)}
        compare(lambda: rms_norm8(x, weight, 1e-5, scale, amax, wide=True), Work(0.0, 5.0 * x.numel()), peers)
        return

    def apart() -> None:
        (dx,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
        quantize8(dx.add_(extra), scale, amax, row=True, column=True)
        quantize8(y.detach(), scale, amax, row=False, column=True)

    arguments = (dy, extra, x, weight, inverse_rms, scale, scale, amax)
    peers = {"norm, addition and casts": apart}
    compare(lambda: rms_norm8_backward(*arguments), Work(0.0, 11.0 * x.numel()), peers)


def test_quantize_weight8(compare: Compare) -> None:
    """Time the two passes over a weight, which happen once per optimizer step."""
    w = torch.randn(10304, 2048, device="cuda")
    compare(lambda: quantize_weight8(w), Work(0.0, 10.0 * w.numel()), {"bf16 cast": lambda: w.bfloat16()})


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_linear(direction: str, layer: str, compare: Compare) -> None:
    """Time a layer from bf16 x to bf16 y; also from dy to dx; and with the weight's gradient added in float32.

    All are recorded as CUDA graphs, as a micro-batch is: calls of small layers wait for the host.
    """
    outputs, inputs, _ = LAYERS[layer]
    x, dy, w = randn(T, inputs), randn(T, outputs), randn(outputs, inputs) / inputs**0.5
    w8, w8t, unit_w = quantize_weight8(w.float())
    total, amax = torch.zeros(outputs, inputs, device="cuda"), scalar(0.0)
    scale, unit = scalar(SCALE), scalar(1 / SCALE)

    def ours() -> tuple[Tensor, ...]:
        x8, _ = quantize8(x, scale, amax)
        y = matmul8(x8, w8, unit, unit_w)
        if direction == "forward":
            return (y,)
        d8, d8t = quantize8(dy, scale, amax, row=True, column=direction == "both")
        dx = matmul8(d8, w8t, unit, unit_w)
        if direction == "both":
            matmul8_add(d8t, transpose8(x8), unit, unit, total)
        return y, dx

    def cast(values: Tensor) -> Tensor:
        return (values.float() * scale).clamp(-448, 448).to(E4M3)

    one_order, other_order = torch.compile(cast), torch.compile(lambda t: cast(t).T.contiguous())

    def scaled_mm() -> tuple[Tensor, ...]:
        accurate = {"use_fast_accum": False}
        y = torch._scaled_mm(one_order(x), w8.T, unit, unit_w, out_dtype=torch.bfloat16, **accurate)
        if direction == "forward":
            return (y,)
        dx = torch._scaled_mm(one_order(dy), w8t.T, unit, unit_w, out_dtype=torch.bfloat16, **accurate)
        if direction == "both":
            dw = torch._scaled_mm(other_order(dy), other_order(x).T, unit, unit, out_dtype=torch.float32, **accurate)
            total.add_(dw)
        return y, dx

    def bf16() -> tuple[Tensor, ...]:
        y = F.linear(x, w)
        if direction == "forward":
            return (y,)
        if direction == "both":
            torch.addmm(total, dy.T, x, out_dtype=torch.float32, out=total)
        return y, dy @ w

    for result, exact in zip(ours(), bf16(), strict=True):
        assert frobenius_error(result, exact) <= 4.5e-2
    peers: dict[str, Peer] = {"compiled, _scaled_mm": scaled_mm, "bf16": bf16}
    for recipe in ("Float8CurrentScaling", "DelayedScaling"):
        peers[f"te.Linear {recipe}"] = te_linear(recipe, x, dy, w, direction)
    replays = {name: peer if isinstance(peer, Absent) else recorded(peer) for name, peer in peers.items()}
    compare(recorded(ours), Work(DIRECTIONS[direction] * 2.0 * T * outputs * inputs, kind="fp8"), replays)


def te_linear(recipe: str, x: Tensor, dy: Tensor, w: Tensor, direction: str) -> Peer:
    """Return Transformer Engine's layer under one of its recipes, with the weight's gradient fused into float32."""
    try:
        te = importlib.import_module("transformer_engine.pytorch")
        recipes = importlib.import_module("transformer_engine.common.recipe")
    except Exception as error:  # a broken build raises anything; the reason is shown
        return Absent(
            f"transformer_engine: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        )
    layer = te.Linear(
        w.shape[1], w.shape[0], bias=False, params_dtype=torch.bfloat16, device="cuda", fuse_wgrad_accumulation=True
    )
    with torch.no_grad():
        layer.weight.copy_(w)
    layer.weight.main_grad = torch.zeros(w.shape, device="cuda")
    layer.weight.requires_grad_(direction == "both")
    back = direction != "forward"
    chosen, leaf = getattr(recipes, recipe)(), x.detach().clone().requires_grad_(back)

    def call(first: bool = False) -> Tensor:
        with torch.set_grad_enabled(back), te.autocast(enabled=True, recipe=chosen):
            y = layer(leaf, is_first_microbatch=first)
        if back:
            leaf.grad = None
            y.backward(dy)
        return y.detach()

    call(first=True)  # casts the weight, and overwrites the weight's gradient
    results = [(call(), F.linear(x, w))]
    if back:
        results.append((leaf.grad, dy @ w))
    if direction == "both":
        results.append((layer.weight.main_grad, 2 * (dy.T @ x)))
    for result, exact in results:
        assert frobenius_error(result, exact) <= 8e-2  # its gradients are E5M2
    return call
