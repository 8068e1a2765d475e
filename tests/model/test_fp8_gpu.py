"""FP8 layers on an H100: kernels against the emulation in a whole model, recorded micro-batches, and evaluation."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from fp8_support import EXPERTS, FP8
from model_support import ENGRAM, packed, small_model, token_ids
from oracle import PRODUCT_ERRORS
from test_model_gpu import SIZES, PinnedRoutes
from torch.nn.functional import cosine_similarity

from yaongi.kernels import use_backend
from yaongi.kernels.backend import OPS
from yaongi.model import Yaongi
from yaongi.model.layers.accumulation import fused_accumulation
from yaongi.model.mixers import moe as moe_module

pytestmark = pytest.mark.gpu
Tensor = torch.Tensor
FP8_OPS = ("quantize8", "transpose8", "quantize_weight8", "squared_relu8", "rms_norm8", "matmul8", "matmul8_add")


def fp8_model(precision: dict[str, Any] = EXPERTS) -> Yaongi:
    return small_model("MEM*ME", torch.bfloat16, precision=precision, **SIZES).to("cuda")


def gradients(model: Yaongi, ids: Tensor, documents: Tensor) -> dict[str, Tensor]:
    """Every gradient of a micro-batch, and the largest magnitudes of its casts."""
    scales: Any = model.fp8_scales
    scales.discard()
    model.zero_grad()
    with scales.first_micro_batch():
        losses = model.losses(ids, documents)
        (losses.cross_entropy_sum / losses.targets + 1e-2 * losses.balance).backward()
    found = {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"amax": scales.amax[:-1].clone()}


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Run the FP8 ops by their references, everything else by its kernels."""
    with contextlib.ExitStack() as stack:
        for op in FP8_OPS:
            stack.enter_context(use_backend("reference", op=op))
        yield


@contextlib.contextmanager
def perturbed(seed: int) -> Iterator[None]:
    """Emulate with errors in every product as large as the tensor cores' own."""
    op = OPS["matmul8"]
    exact, generator = op.implementation("reference"), torch.Generator("cuda").manual_seed(seed)

    def product(
        a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, addend: Any, dtype: Any, promoted: bool
    ) -> Tensor:
        out = exact(a, b, unit_a, unit_b, addend, torch.float32, promoted)
        error = PRODUCT_ERRORS[True]["zero mean"] * out.square().mean().sqrt()
        return (out + error * torch.randn(out.shape, device="cuda", generator=generator)).to(dtype)

    with emulated(), mock.patch.dict(op.resolved, reference=product):
        yield


def test_kernels_are_near_the_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same scales and routes, a whole model's gradients, dense products in FP8: as near as the emulation is to
    itself when its products err as the tensor cores do (a flipped code of 8 bits is large: 0.995 in cosine); the same
    bits in two runs.
    """
    model = fp8_model(FP8)
    ids, documents = token_ids(model, 2, 208).cuda(), packed((60, 1, 147), (208,)).cuda()
    routes = PinnedRoutes()
    monkeypatch.setattr(moe_module, "moe_route", routes)
    gradients(model, ids, documents)  # calibrates: each layer asks once, whatever is cast twice

    def again(how: contextlib.AbstractContextManager[None]) -> dict[str, Tensor]:
        routes.restart()
        with how:
            return gradients(model, ids, documents)

    first, second = (again(contextlib.nullcontext()) for _ in range(2))
    expected = again(emulated())
    near = [again(perturbed(seed)) for seed in range(2)]

    def distance(found: dict[str, Tensor], name: str) -> float:
        pair = (t[name].flatten().double() for t in (found, expected))
        return 1 - float(cosine_similarity(*pair, dim=0))

    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name
        if gradient.numel() >= 256:  # a few numbers of one layer scatter more
            bound = 3 * max(distance(found, name) for found in near) + 1e-3
            assert distance(first, name) <= bound, f"{name}: 1 - {distance(first, name)}, bound {bound}"


@pytest.mark.parametrize("rows", [1, 3])
def test_a_recorded_micro_batch_reads_new_scales_and_weights(rows: int) -> None:
    """Replays give the bits of plain runs, also after a step has changed weights and scales."""
    model = fp8_model()
    scales: Any = model.fp8_scales
    batches = [(token_ids(model, rows, 208).cuda(), packed(*[(60, 1, 147)] * rows).cuda()) for _ in range(4)]
    ids, documents = (t.clone() for t in batches[0])
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    stream = torch.cuda.Stream()

    def micro_batch() -> None:
        with fused_accumulation():
            losses = model.losses(ids, documents)
            (losses.cross_entropy_sum / losses.targets).backward()

    def run(recorded: bool) -> list[dict[str, Tensor]]:
        found = []
        for given_ids, given_documents in batches:
            ids.copy_(given_ids)
            documents.copy_(given_documents)
            for parameter in model.parameters():
                parameter.grad.zero_()  # type: ignore[union-attr]
            model.refresh_fp8()
            if recorded:
                graph.replay()
            else:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream), scales.first_micro_batch():
                    micro_batch()
                torch.cuda.current_stream().wait_stream(stream)
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            scales.advance()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01)
        return found

    run(recorded=False)  # calibrates, and makes workspaces and casts of weights
    state = {name: t.clone() for name, t in model.state_dict().items()}
    buffers = {name: t.clone() for name, t in scales.named_buffers()}
    expected = run(recorded=False)
    model.refresh_fp8()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        micro_batch()
    model.load_state_dict(state)
    for name, buffer in scales.named_buffers():
        buffer.copy_(buffers[name])
    for results, wanted in zip(run(recorded=True), expected, strict=True):
        for name, gradient in results.items():
            assert torch.equal(gradient, wanted[name]), name


def test_an_evaluation_runs_any_length_and_leaves_no_trace() -> None:
    model = fp8_model()
    scales: Any = model.fp8_scales
    gradients(model, token_ids(model, 2, 208).cuda(), packed((208,), (208,)).cuda())
    before = {name: t.clone() for name, t in scales.named_buffers() if name != "amax"}
    amax, ids = scales.amax[:-1].clone(), token_ids(model, 1, 77).cuda()
    with torch.no_grad():
        ours = model(ids)
        with scales.disabled():
            plain = model(ids)
    assert torch.equal(scales.amax[:-1], amax)
    assert all(torch.equal(t, before[name]) for name, t in scales.named_buffers() if name != "amax")
    cosine = cosine_similarity(ours.flatten().double(), plain.flatten().double(), dim=0)
    assert 0.9 < cosine < 1  # some tokens go to other experts


def test_engrams_layers_run() -> None:
    assert ENGRAM in SIZES["engram"]  # type: ignore[operator]
    model = fp8_model()
    found = gradients(model, token_ids(model, 2, 208).cuda(), packed((60, 148), (208,)).cuda())
    assert all(gradient.isfinite().all() for gradient in found.values())
