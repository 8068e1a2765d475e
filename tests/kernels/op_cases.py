"""One call of every public op, for the tests that hold for all ops: a new op joins by a case here.

The sizes are those that the Triton and CUDA implementations take, in the dtypes named by a case.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from support import Results, converted, document_ids, outputs_and_gradients, tensors_in, widened

import yaongi.kernels
from yaongi.kernels.backend import OPS

Tensor = torch.Tensor
IN_PLACE = {
    "attention_step": ("keys", "values"),
    "causal_conv1d_step": ("state",),
    "mamba_step": ("state",),
    "teon_update": ("params", "momenta", "masters"),
    "quantize8": ("amax",),
    "squared_relu8": ("amax",),
    "squared_relu8_backward": ("amax",),
    "rms_norm8": ("amax",),
    "rms_norm8_backward": ("amax",),
    "matmul8_add": ("total",),
    "moe8": ("amax",),
    "moe8_backward": ("amax", "dw_up", "dw_down"),
}


@dataclass(frozen=True)
class Case:
    """The arguments of a call in float64, those that get a gradient, and the dtype that fast kernels take."""

    arguments: dict[str, Any]
    wanted: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    keep_float32: tuple[str, ...] = ()  # arguments that stay float32 in a narrower dtype
    codes: tuple[str, ...] = ()  # arguments in float8_e4m3fn, which stand here as bytes
    scalars: tuple[str, ...] = ()  # arguments that are scalar tensors in float32, which stand here as numbers
    rows: tuple[str, ...] = ()  # arguments whose first dimension counts independent rows: sequences, tokens, matrices

    def on(self, device: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The arguments on a device, floats in a dtype (the case's own if None), integers as they are."""
        narrow = self.dtype if dtype is None else dtype
        wide = torch.promote_types(narrow, torch.float32)
        moved = {}
        for name, value in self.arguments.items():
            if name in self.codes or name in self.scalars:
                value = torch.as_tensor(value) if name in self.scalars else value.view(torch.float8_e4m3fn)
                moved[name] = value.to(device, copy=True)
                continue
            kind = wide if name in self.keep_float32 else narrow
            value = converted(value, lambda t, kind=kind: t.to(device, kind, copy=True))
            moved[name] = value.to(device) if isinstance(value, torch.Tensor) else value
        return moved

    def one_row(self) -> "Case":
        """The same call on the first row alone."""
        sliced = {name: value[:1] if name in self.rows else value for name, value in self.arguments.items()}
        return replace(self, arguments=sliced)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scan_arguments(B: int, L: int, H: int, P: int, G: int, N: int) -> dict[str, Any]:
    """What `mamba_scan` and, at one token, `mamba_step` share."""
    return {
        "x": randn(B, L, H, P),
        "dt": randn(B, L, H),
        "A": -randn(H).exp(),
        "b": randn(B, L, G, N),
        "c": randn(B, L, G, N),
        "D": randn(H),
        "dt_bias": randn(H) - 1,
    }


def one_token(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a step: without the sequence's dimension."""
    return {name: value[:, 0] if name in ("x", "dt", "b", "c") else value for name, value in arguments.items()}


def codes(*shape: int) -> Tensor:
    """The bytes of random 8-bit floats."""
    return torch.randn(*shape).to(torch.float8_e4m3fn).view(torch.uint8)


def moe8_cases() -> dict[str, Case]:
    """Both directions of the experts in FP8, which share the routing and some scalars."""
    T, D, F, E, K = 40, 32, 48, 4, 2
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int()
    routing = {"expert_ids": ids, "expert_weights": randn(T, K)}
    units = {"unit_up": 0.5, "unit_down": 0.25, "scale": 8.0, "amax": 0.5}
    weights = {"w_up8": codes(E, F, D), "w_down8": codes(E, D, F)}
    forward = {"x8": codes(T, D), "unit_x": 0.5, **weights, **units, **routing, "residual": randn(T, D)}
    transposed = {"w_up8t": codes(E, D, F), "w_down8t": codes(E, F, D), "a8": codes(T * K, F) & 127}
    backward = {"d8": codes(T, D), "unit_d": 0.5, "unit_a": 0.5, **transposed, **units, **routing}
    backward |= {"dy": randn(T, D), "x": randn(T, D), "addend": randn(T, D)}
    sums = {"dw_up": randn(E, F, D), "dw_down": randn(E, D, F)}
    rows = ("x8", "expert_ids", "expert_weights", "residual")
    return {
        "moe8": Case(
            forward,
            keep_float32=("expert_weights",),
            codes=("x8", *weights),
            scalars=("unit_x", *units),
            rows=rows,
        ),
        "moe8_backward": Case(
            backward | sums,
            keep_float32=("expert_weights", *sums),
            codes=("d8", *transposed),
            scalars=("unit_d", "unit_a", *units),
        ),
    }


def fp8_cases() -> dict[str, Case]:
    """The casts to FP8 and the products; sizes are multiples of 16, as the other order needs them."""
    scale, scalars = {"scale": 64.0, "amax": 0.5}, ("scale", "amax")
    operands = {"a": codes(40, 64), "b": codes(48, 64), "unit_a": 0.5, "unit_b": 0.125}
    product = {"codes": ("a", "b"), "scalars": ("unit_a", "unit_b")}
    norm = {"x": randn(48, 96), "weight": randn(96)}
    scales = {"scale_y": 64.0, "scale_d": 32.0, "amax": 0.5}
    gradients = {"dy": randn(48, 96), "extra": randn(48, 96), **norm, "inverse_rms": randn(48).abs()}
    relu = {"da": randn(48, 96), "a8": codes(48, 96) & 127, "unit": 0.5, **scale}
    return {
        "quantize8": Case({"x": randn(48, 96), **scale, "column": True}, scalars=scalars),
        "transpose8": Case({"x8": codes(3, 48, 96)}, codes=("x8",)),
        "quantize_weight8": Case({"w": randn(3, 48, 96)}, dtype=torch.float32),
        "squared_relu8": Case({"h": randn(48, 96), **scale}, scalars=scalars),
        "squared_relu8_backward": Case(relu, codes=("a8",), scalars=("unit", *scalars)),
        "rms_norm8": Case(norm | {"eps": 1e-3, **scale, "wide": True}, scalars=scalars, rows=("x",)),
        "rms_norm8_backward": Case(gradients | scales, keep_float32=("inverse_rms",), scalars=tuple(scales)),
        "matmul8": Case(operands | {"addend": randn(40, 48)}, rows=("a", "addend"), **product),
        "matmul8_add": Case(operands | {"total": randn(40, 48)}, dtype=torch.float32, rows=("a", "total"), **product),
    }


@cache
def cases() -> dict[str, Case]:
    """One call of every public op with all its optional tensors, by the op's name; the same numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _cases() | fp8_cases() | moe8_cases()


def _cases() -> dict[str, Case]:
    scan = scan_arguments(2, 300, 4, 16, 2, 24)
    conv = {"x": randn(2, 90, 48), "weight": randn(48, 4), "bias": randn(48)}
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(200)]).int()  # more pairs than few_tokens.py takes
    matrices = {name: [randn(24, 40) for _ in range(4)] for name in ("params", "grads", "momenta", "masters")}
    half = torch.float16
    cache = {name: randn(3, 2, 160, 16) for name in ("keys", "values")}
    place = torch.tensor([150, 0, 70])
    visible = (torch.arange(160) <= place[:, None]) & ((torch.arange(160) > 40) | (place[:, None] < 100))
    return {
        "attention_step": Case(
            {"q": randn(3, 6, 16), "k": randn(3, 2, 16), "v": randn(3, 2, 16)}
            | cache
            | {"visible": visible, "place": place, "length": 152},
            rows=("q", "k", "v", "keys", "values", "visible", "place"),
        ),
        "causal_conv1d": Case(
            conv
            | {
                "document_ids": document_ids(2, (30, 1, 59)),
                "initial_state": randn(2, 48, 3),
                "return_final_state": True,
            },
            ("x", "weight", "bias", "initial_state"),
            rows=("x", "document_ids", "initial_state"),
        ),
        "causal_conv1d_step": Case(
            conv | {"x": randn(2, 48), "state": randn(2, 3, 48, 3), "steps": torch.tensor([4, 0])},
            rows=("x", "state", "steps"),
        ),
        "mamba_scan": Case(
            scan
            | {
                "document_ids": document_ids(2, (70, 1, 229)),
                "initial_state": randn(2, 4, 16, 24),
                "return_final_state": True,
            },
            ("x", "dt", "A", "b", "c", "D", "dt_bias", "initial_state"),
            keep_float32=("A", "initial_state"),
            rows=("x", "dt", "b", "c", "document_ids", "initial_state"),
        ),
        "cross_entropy": Case(
            {"logits": randn(70, 48), "targets": torch.arange(-22, 48)}, ("logits",), rows=("logits", "targets")
        ),
        "linear_step": Case(
            {"x": randn(5, 272), "weight": randn(40, 272), "addend": randn(5, 40), "activation": None},
            rows=("x", "addend"),
        ),
        "linear_steps": Case(
            {"x": randn(5, 272), "weights": [randn(40, 272), randn(7, 272)], "settled": True}, rows=("x",)
        ),
        "likeliest": Case({"logits": randn(5, 2056)}, rows=("logits",)),
        "mamba_core": Case(
            {
                "projected": randn(2, 90, 64 + 160 + 4),
                "taps": randn(160, 4),
                "taps_bias": randn(160),
                "weight": randn(64),
                "groups": 2,
                "eps": 1e-3,
                "document_ids": document_ids(2, (30, 1, 59)),
            }
            | {name: scan[name] for name in ("A", "D", "dt_bias")},
            ("projected", "taps", "taps_bias", "A", "D", "dt_bias", "weight"),
            keep_float32=("A",),
            rows=("projected", "document_ids"),
        ),
        "mamba_step": Case(
            one_token(scan) | {"state": randn(2, 4, 16, 24)},
            keep_float32=("A", "state"),
            rows=("x", "dt", "b", "c", "state"),
        ),
        "moe_route": Case(
            {"logits": randn(70, 8), "bias": randn(8), "top_k": 3, "scale": 2.5},
            ("logits",),
            torch.float32,
            rows=("logits",),
        ),
        "moe": Case(
            {
                "x": randn(200, 32),
                "w_up": randn(8, 48, 32),
                "w_down": randn(8, 32, 48),
                "expert_ids": ids,
                "expert_weights": randn(200, 3),
            },
            ("x", "w_up", "w_down", "expert_weights"),
            keep_float32=("expert_weights",),
            rows=("x", "expert_ids", "expert_weights"),
        ),
        "moe_step": Case(
            {
                "x": randn(4, 32),
                "w_up": randn(8, 48, 32),
                "w_down": randn(8, 32, 48),
                "shared_up": randn(40, 32),
                "shared_down": randn(32, 40),
                "expert_ids": ids[:4],
                "expert_weights": randn(4, 3),
            },
            keep_float32=("expert_weights",),
            rows=("x", "expert_ids", "expert_weights"),
        ),
        "rms_norm": Case(
            {"x": randn(5, 7, 96), "weight": randn(96), "residual": randn(5, 7, 96)},
            ("x", "weight", "residual"),
            rows=("x", "residual"),
        ),
        "gated_rms_norm": Case(
            {"x": randn(5, 7, 96), "z": randn(5, 7, 96), "weight": randn(96), "groups": 4},
            ("x", "z", "weight"),
            rows=("x", "z"),
        ),
        "symmetric_product": Case(
            {"x": randn(3, 24, 40), "c": randn(3, 24, 24), "alpha": 0.5, "beta": 2.0}, ("x", "c"), half, rows=("x", "c")
        ),
        "newton_schulz": Case({"x": randn(3, 24, 40)}, dtype=half, rows=("x",)),
        "teon_update": Case(matrices | {"stack": 2, "lr": 0.1, "weight_decay": 0.1}, keep_float32=("masters",)),
    }


def run(op: str, arguments: dict[str, Any], wanted: tuple[str, ...] = ()) -> Results:
    """All that a call returns, changes or gives as a gradient."""
    function: Callable[..., Any] = getattr(yaongi.kernels, op)
    if op in IN_PLACE:
        results = {f"output {i}": t for i, t in enumerate(tensors_in(function(**arguments)))}
        for name in IN_PLACE[op]:
            value = arguments[name]
            results |= {f"{name} {i}": t for i, t in enumerate(value)} if isinstance(value, list) else {name: value}
    else:
        results = outputs_and_gradients(function, arguments, wanted)
    return widened(results)


PUBLIC = {name for name in yaongi.kernels.__all__ if name in OPS}
UNCASED = {"cross_entropy_backward"}  # public ops that are compared as the gradient of another
