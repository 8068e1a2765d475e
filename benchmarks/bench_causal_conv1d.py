"""Causal convolution + silu on a slice of in_proj's output, as in Mamba-2, against torch.compile and peers."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from measure import Absent, Compare, Peer, Work
from oracle import assert_close
from torch.nn import functional as F

from yaongi.kernels import causal_conv1d, use_backend

BATCH, LENGTH, WIDE, OFFSET, CHANNELS, TAPS = 8, 4096, 10304, 4096, 6144, 4
Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@torch.compile
def compiled_taps(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Compute the convolution as shifted products, which torch.compile fuses: its fastest form here."""
    padded, length = F.pad(x, (0, 0, TAPS - 1, 0)), x.shape[1]
    return F.silu(sum(padded[:, k : k + length] * weight[:, k] for k in range(TAPS)) + bias)


@torch.compile
def compiled_conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Compute the convolution with torch's depthwise conv1d."""
    out = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=TAPS - 1, groups=x.shape[2])[..., : x.shape[1]]
    return F.silu(out).mT


def package_peer() -> Function | Absent:
    """Return Dao-AILab's causal-conv1d if it is installed; it takes (B, C, L) with unit stride along C."""
    if importlib.util.find_spec("causal_conv1d") is None:
        return Absent("pip install causal-conv1d")
    from causal_conv1d import causal_conv1d_fn

    return lambda x, weight, bias: causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT


class Case:
    """The tensors of the benchmark: x is a slice of a wider tensor, in bf16."""

    def __init__(self, documents: bool) -> None:
        torch.manual_seed(0)
        wide = torch.randn(BATCH, LENGTH, WIDE, device="cuda", dtype=torch.bfloat16)
        self.x = wide[..., OFFSET : OFFSET + CHANNELS].requires_grad_()
        self.weight = (torch.randn(CHANNELS, TAPS, device="cuda") / 2).bfloat16().requires_grad_()
        self.bias = torch.randn(CHANNELS, device="cuda").bfloat16().requires_grad_()
        self.dy = torch.randn(BATCH, LENGTH, CHANNELS, device="cuda", dtype=torch.bfloat16)
        starts = torch.rand(BATCH, LENGTH, device="cuda") < 1 / 600
        self.document_ids = starts.cumsum(1).int() if documents else None

    def ours(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return causal_conv1d(x, weight, bias, document_ids=self.document_ids)

    def forward(self, function: Function) -> Callable[[], torch.Tensor]:
        return torch.no_grad()(lambda: function(self.x, self.weight, self.bias))

    def both(self, function: Function) -> Callable[[], tuple[torch.Tensor, ...]]:
        inputs = (self.x, self.weight, self.bias)
        return lambda: torch.autograd.grad(function(*inputs), inputs, self.dy)

    def check(self) -> None:
        """Check the tolerance rule (tests/oracle.py) on some of the rows, for the output and all gradients."""
        rows, ids = slice(0, 1), None if self.document_ids is None else self.document_ids[:1]
        results = {}
        for name, dtype in (("triton", torch.bfloat16), ("reference", torch.bfloat16), ("exact", torch.float64)):
            with use_backend("reference" if name == "exact" else name):
                inputs = [t.detach().to(dtype).requires_grad_() for t in (self.x[rows], self.weight, self.bias)]
                y = causal_conv1d(*inputs, document_ids=ids)
                results[name] = (y.detach(), *torch.autograd.grad(y, inputs, self.dy[rows].to(dtype)))
        for ours, exact, plain in zip(results["triton"], results["exact"], results["reference"], strict=True):
            assert_close(ours, exact, plain)


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("direction", ["forward", "forward_and_backward"])
def test_causal_conv1d(direction: str, documents: bool, compare: Compare) -> None:
    """Time (8, 4096, 6144) of a 10304-wide tensor; the floor reads each input and writes each output once."""
    case = Case(documents)
    case.check()
    tensor_bytes = 2 * BATCH * LENGTH * CHANNELS
    forward = direction == "forward"
    timed = case.forward if forward else case.both
    peers: dict[str, Peer] = {}
    if not documents:  # the peers don't support documents
        functions: dict[str, Function | Absent] = {"compiled": compiled_taps, "compiled conv1d": compiled_conv1d}
        functions["causal-conv1d"] = package_peer()
        peers = {name: f if isinstance(f, Absent) else timed(f) for name, f in functions.items()}
    compare(timed(case.ours), Work(bytes=(2 if forward else 5) * tensor_bytes), peers)
