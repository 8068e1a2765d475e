"""The head and its loss, forward and backward, in chunks with recomputed logits, against torch's and liger-kernel's."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import Absent, Compare, Peer, Work, peak_gb
from oracle import assert_close
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from yaongi.kernels import cross_entropy
from yaongi.kernels.cross_entropy.op import cross_entropy_backward
from yaongi.kernels.cross_entropy.reference import cross_entropy_backward_reference, cross_entropy_reference
from yaongi.model.losses import head_cross_entropy

V = 32768
SHAPES = {"yaongi-4b": (8192, 2048), "yaongi-small": (32768, 768)}  # T, d
CHUNK = 4096  # tokens per chunk of the peers: logits held at a time
Tensor = torch.Tensor


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_cross_entropy(direction: str, compare: Compare) -> None:
    """Time the two memory-bound passes over a chunk's logits."""
    logits = 3 * torch.randn(CHUNK, V, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(V, (CHUNK,), device="cuda")
    _, normalizers = cross_entropy(logits, targets)
    arguments: tuple[Tensor, ...] = (logits, targets)
    ours, reference = cross_entropy, cross_entropy_reference
    if direction == "backward":
        arguments = (torch.ones_like(normalizers), torch.zeros_like(normalizers), logits, targets, normalizers)
        ours, reference = cross_entropy_backward, cross_entropy_backward_reference
    some = [t[:64] for t in arguments]
    exact = reference(*(t.double() if t.is_floating_point() else t for t in some))
    results = (found if isinstance(found, tuple) else (found,) for found in (ours(*some), exact, reference(*some)))
    for found, wanted, plain in zip(*results, strict=True):
        assert_close(found, wanted, plain)
    compiled = torch.compile(reference)
    peers: dict[str, Peer] = {"torch": lambda: reference(*arguments), "compiled": lambda: compiled(*arguments)}
    passes = 1 if direction == "forward" else 2
    compare(lambda: ours(*arguments), Work(0.0, 2.0 * passes * CHUNK * V), peers)


@pytest.mark.parametrize("preset", SHAPES)
def test_head(preset: str, compare: Compare) -> None:
    """Time hidden states to loss and back, four products of T × d × V."""
    T, d = SHAPES[preset]
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, d, device="cuda", dtype=torch.bfloat16) for n in (T, V))
    leaves = [hidden.requires_grad_(), (weight / d**0.5).requires_grad_()]
    targets = torch.randint(V, (T,), device="cuda")

    def timed(loss: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), leaves)

    def chunked() -> Tensor:
        parts = zip(leaves[0].split(CHUNK), targets.split(CHUNK), strict=True)
        return torch.stack([checkpoint(compiled, h, leaves[1], t, use_reentrant=False) for h, t in parts]).sum()

    compiled = torch.compile(lambda h, w, t: F.cross_entropy((h @ w.T).float(), t, reduction="sum"))
    ours = timed(lambda: head_cross_entropy(*leaves, targets)[0])
    peers: dict[str, Peer] = {"compiled, chunked": timed(chunked), "liger-kernel": liger(leaves, targets)}
    peaks = {"peak": ours, "peak of compiled": timed(chunked)}
    notes = {name: f"{peak_gb(call, beyond_results=True):.2f} GB" for name, call in peaks.items()}
    compare(ours, Work(8.0 * T * d * V, 0.0), peers, notes)


def liger(leaves: list[Tensor], targets: Tensor) -> Peer:
    """Return liger-kernel's fused head, which computes the gradients in the forward."""
    if importlib.util.find_spec("liger_kernel") is None:
        return Absent("pip install liger-kernel")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def call() -> Any:
        loss = liger_fused_linear_cross_entropy(leaves[0], leaves[1], targets, reduction="sum")
        return torch.autograd.grad(loss[0] if isinstance(loss, tuple) else loss, leaves)

    return call
