"""The flagship's layers as in a training step: against the references, and the cost of recomputing one."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import Compare, Work, interleaved_ms, replay_of, report

from yaongi.kernels import use_backend
from yaongi.kernels.backend import Backend
from yaongi.model import Yaongi
from yaongi.model.config import PRECISION_ROLES, PrecisionConfig
from yaongi.model.initialize import initialize
from yaongi.model.layers.accumulation import fused_accumulation
from yaongi.model.mixers.attention_backends import plan_attention
from yaongi.model.model import Context, Layer
from yaongi.train.config import load_config
from yaongi.train.recompute import KINDS

B, L = 8, 4096
CHUNK = 128  # chunk size for which the scan's FLOPs are counted


def flops(layer: Layer) -> float:
    """Return the layer's share of the model's FLOPs: six per token and active parameter, and three times the scan."""
    mixer, active = layer.mixer, sum(p.numel() for p in layer.parameters())
    if layer.kind == "E":
        routed = sum(p.numel() for p in mixer.experts.parameters())
        return 6.0 * B * L * (active - routed * (1 - mixer.top_k / mixer.experts.up_proj.shape[0]))
    width = mixer.splits[0]
    scan = 2 * (mixer.groups * mixer.state * CHUNK / 2 + width * CHUNK / 2 + 2 * width * mixer.state)
    return B * L * (6.0 * active + 3 * scan)


@pytest.mark.parametrize("kind", ["M", "E"], ids=["mamba", "experts"])
def test_layer(kind: str, compare: Compare) -> None:
    """Time norm, mixer and residual of one layer of `yaongi-4b` in bf16, 8 × 4096 tokens, with every gradient."""
    config = load_config("yaongi-4b").model
    index = config.pattern.index(kind)
    layer = Layer(config, index, None, torch.device("cuda"), torch.bfloat16)
    initialize(layer, config, 0)
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    hidden, delta = (torch.randn(B, L, config.hidden_size, **bf16).requires_grad_() for _ in range(2))
    dy = torch.randn(B, L, config.hidden_size, **bf16)
    inputs = (hidden, delta, *layer.parameters())

    def on(backend: Backend | None) -> Callable[[], Any]:
        def call() -> Any:
            with use_backend(backend):
                outputs = layer(hidden, delta, Context(None, None, None))[:2]
                return torch.autograd.grad(outputs, inputs, (dy, dy))

        return call

    compare(on(None), Work(flops(layer)), {"references": on("reference")})


@pytest.mark.parametrize("kind", ["M", "E", "*"], ids=["mamba", "experts", "attention"])
def test_fp8_layer(kind: str, compare: Compare) -> None:
    """Time one layer with its products in FP8 against bf16: 2 × 4096 tokens, gradients added in float32.

    Both are graphs, so the host's time is left out. The layer before is one of FP8 too: its gradient is cast here.
    """
    recorded = {}
    variants = {"fp8": PRECISION_ROLES[kind], "bf16": ()}
    if kind == "E":
        variants["shared expert alone in fp8"] = PRECISION_ROLES[kind][:1]
    for name, roles in variants.items():
        config = dataclasses.replace(
            load_config("yaongi-4b").model,
            pattern=2 * kind,
            engram=(),
            precision=PrecisionConfig(**dict.fromkeys(roles, "fp8"), high_layers=()),
        )
        model = Yaongi(config, device="cuda", dtype=torch.bfloat16)
        ids = torch.zeros(2, L, dtype=torch.int64, device="cuda")
        context = model.backbone.context(ids, torch.zeros_like(ids, dtype=torch.int32), with_routing=True)
        layer = model.backbone.layers[1]
        hidden, dy = (torch.randn(2, L, config.hidden_size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        hidden.requires_grad_()
        for parameter in layer.parameters():
            parameter.grad_dtype = torch.float32
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        recorded[name] = _recorded(model, layer, hidden, dy, context)
    share = config.experts_per_token / config.experts
    used = sum(p.numel() * (share if p.dim() == 3 else 1) for n, p in layer.named_parameters() if "_proj" in n)
    compare(recorded.pop("fp8"), Work(6.0 * 2 * L * used, kind="fp8"), recorded)


def _recorded(model: Any, layer: Any, hidden: torch.Tensor, dy: torch.Tensor, context: Context) -> Callable[[], Any]:
    """Return the replay of a layer's forward and backward pass; the first run calibrates the scales."""
    scales = model.fp8_scales

    def run() -> None:
        with fused_accumulation():
            out, delta, _ = layer(hidden, None, context)
            hidden.grad = None
            (out if delta is None else out + delta).backward(dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        with contextlib.nullcontext() if scales is None else scales.first_micro_batch():
            run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    graph.replay()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    return replay_of(graph, (model, hidden, dy, context))


@pytest.mark.parametrize("kind", KINDS)
def test_recompute(kind: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time one layer's forward, 2 × 4096 tokens, in a graph, per byte that it saves for the backward.

    `--recompute` should name the kinds with the fewest milliseconds per GB first.
    """
    config = load_config("yaongi-4b").model
    layer = Layer(config, config.pattern.index(KINDS[kind]), None, torch.device("cuda"), torch.bfloat16)
    initialize(layer, config, 0)
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    hidden, delta = (torch.randn(2, L, config.hidden_size, **bf16).requires_grad_() for _ in range(2))
    documents = torch.zeros(2, L, dtype=torch.int32, device="cuda")
    plan = plan_attention("auto", documents.shape, documents, documents.device, torch.bfloat16)
    context = Context(documents, plan, None, with_routing=True)
    for _ in range(2):
        layer(hidden, delta, context)
    before = torch.cuda.memory_allocated()
    total, following, routing = layer(hidden, delta, context)
    kept = torch.cuda.memory_allocated() - before - sum(t.nbytes for t in (total, following))
    assert kept > hidden.nbytes, kept  # if less, autograd has recorded nothing
    del total, following, routing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(hidden, delta, context)
    ms = interleaved_ms({"layer": graph.replay}, lambda: None)["layer"]
    report(benchmark, request, {"forward_ms": ms, "keeps": f"{kept / 1e9:.3f} GB", "ms_per_gb": 1e9 * ms / kept})
