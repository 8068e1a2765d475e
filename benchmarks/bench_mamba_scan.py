"""The Mamba-2 scan, its step and the mixer core around it, against mamba_ssm's Triton kernels."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from composition import mamba_ssm_scan
from measure import Absent, Compare, Peer, Work, peak_gb
from torch.nn import functional as F

from yaongi.kernels import causal_conv1d, gated_rms_norm, mamba_core, mamba_scan, mamba_step, use_backend

H, P, N, TAPS, EPS = 64, 64, 128, 4, 1e-5
SHAPES = [(8, 4096, 8), (8, 4096, 1), (2, 16384, 8), (1, 32768, 8)]  # B, L, G
WINDOWS = 8  # windows of 1,008 tokens for the errors; their last chunk is a partial one
RESULTS = ("y", "dx", "ddt", "dA", "db", "dc", "dD", "ddt_bias")
Tensors = tuple[torch.Tensor, ...]
Scan = Callable[..., torch.Tensor]
MAMBA_SSM = "pip install mamba-ssm"


def peer_scan(chunk: int) -> Scan | Absent:
    """Return mamba_ssm's scan with one of its chunk sizes."""
    return mamba_ssm_scan(chunk) if importlib.util.find_spec("mamba_ssm") else Absent(MAMBA_SSM)


class Case:
    """The tensors of a scan as a trained model has them: x, b and c slices of the convolution's output."""

    def __init__(self, B: int, L: int, G: int) -> None:
        torch.manual_seed(0)
        bf16, fp32 = {"device": "cuda", "dtype": torch.bfloat16}, {"device": "cuda"}
        self.G, self.tokens = G, B * L
        packed = F.silu(torch.randn(B, L, H * P + 2 * G * N, **bf16))
        x, b, c = packed.split([H * P, G * N, G * N], dim=-1)
        step = torch.empty(H, **fp32).uniform_(-6.9, -2.3).exp()  # 0.001 to 0.1, Mamba-2's initialisation
        made = (
            x.unflatten(-1, (H, P)),
            torch.randn(B, L, H, **bf16),
            -torch.empty(H, **fp32).uniform_(1, 16),
            b.unflatten(-1, (G, N)),
            c.unflatten(-1, (G, N)),
            torch.ones(H, **fp32),
            step + torch.log(-torch.expm1(-step)),
        )
        self.inputs: Tensors = tuple(t.requires_grad_() for t in made)
        self.dy = torch.randn(B, L, H, P, **bf16)

    @property
    def work(self) -> dict[str, Work]:
        """FLOPs as the model counts them (chunks of 128); bytes to read each input and write each output once."""
        flops = 2.0 * self.tokens * (self.G * N * 64 + H * P * 64 + 2 * H * P * N)
        heads, groups, steps = (2.0 * self.tokens * n for n in (H * P, self.G * N, H))
        forward, backward = 2 * heads + 2 * groups + steps, 3 * heads + 4 * groups + 2 * steps
        return {
            "forward": Work(flops, forward),
            "backward": Work(2 * flops, backward),
            "forward_and_backward": Work(3 * flops, forward + backward),
        }

    def timed(self, scan: Scan, direction: str) -> Callable[[], Any]:
        if direction == "forward":
            return torch.no_grad()(lambda: scan(*self.inputs))
        if direction == "forward_and_backward":
            return lambda: torch.autograd.grad(scan(*self.inputs), self.inputs, self.dy)
        y = scan(*self.inputs)
        return lambda: torch.autograd.grad(y, self.inputs, self.dy, retain_graph=True)

    def results(self, scan: Scan, window: int, dtype: torch.dtype | None = None) -> Tensors:
        """Return output and gradients on one of the eight windows of 1,008 tokens."""
        x, dt, A, b, c, D, bias = self.inputs
        first = window * self.tokens // WINDOWS
        x, dt, b, c, dy = (t.flatten(0, 1)[None, first : first + 1008] for t in (x, dt, b, c, self.dy))
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, dt, A, b, c, D, bias)]
        y = scan(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def relative_errors(case: Case, *scans: Scan) -> list[list[float]]:
    """Return for each scan the relative Frobenius errors of output and gradients, as root mean square over the windows.

    One window alone would be too few samples: dA, a sum over all its tokens, has only 64 numbers.
    """
    squares = torch.zeros(len(scans), len(RESULTS), dtype=torch.float64)
    for window in range(WINDOWS):
        with use_backend("reference"):
            exact = case.results(mamba_scan, window, torch.float64)
        for i, scan in enumerate(scans):
            for k, (r, e) in enumerate(zip(case.results(scan, window), exact, strict=True)):
                squares[i, k] += float((r.double() - e).norm() / e.norm()) ** 2
    return (squares / WINDOWS).sqrt().tolist()


@functools.cache
def check(shape: tuple[int, int, int]) -> None:
    """Check once per shape that no error exceeds 1.2 × the peer's own, or 1 % if the peer is absent."""
    case, peer = Case(*shape), peer_scan(256)
    scans = (mamba_scan,) if isinstance(peer, Absent) else (mamba_scan, peer)
    ours, theirs = (*relative_errors(case, *scans), [1e-2 / 1.2] * len(RESULTS))[:2]
    for name, our, their in zip(RESULTS, ours, theirs, strict=True):
        assert our <= 1.2 * their + 1e-6, f"{name}: relative error {our:.2e}, the peer's {their:.2e}"


def peak(call: Callable[[], Any]) -> str:
    """Return a call's peak memory beyond its results as text."""
    return f"{peak_gb(call, beyond_results=True):.2f} GB"


@pytest.mark.parametrize("direction", ["forward", "backward", "forward_and_backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-L{}-G{}".format(*s))
def test_mamba_scan(shape: tuple[int, int, int], direction: str, compare: Compare) -> None:
    """Time 64 heads of 64 × 128 over 32,768 tokens, against the larger of the floors by FLOPs and by bytes."""
    check(shape)
    case = Case(*shape)
    scans = {f"mamba_ssm {chunk}": peer_scan(chunk) for chunk in (256, 128)}
    peers: dict[str, Peer] = {
        name: scan if isinstance(scan, Absent) else case.timed(scan, direction) for name, scan in scans.items()
    }
    call = case.timed(mamba_scan, direction)
    notes = {"peak": peak(call)} | {f"peak of {n}": peak(p) for n, p in peers.items() if not isinstance(p, Absent)}
    compare(call, case.work[direction], peers, notes)


def mamba_ssm_step() -> Scan | Absent:
    """Return mamba_ssm's step, which takes every parameter expanded to the state's shape."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return Absent(MAMBA_SSM)
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def step(
        state: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        D: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        wide = (t[..., None].expand(*t.shape, P) for t in (dt, D, bias))
        wide_dt, wide_D, wide_bias = wide
        wide_A = A[:, None, None].expand(H, P, N)
        return selective_state_update(state, x, wide_dt, wide_A, b, c, wide_D, dt_bias=wide_bias, dt_softplus=True)

    return step


@pytest.mark.parametrize("B", [1, 8, 64, 256])
def test_mamba_step(B: int, compare: Compare) -> None:
    """Time one decode step; the floor reads and writes the fp32 state once."""
    case = Case(B, 1, 8)
    x, dt, A, b, c, D, bias = (t.detach() for t in case.inputs)
    token = (x[:, 0], dt[:, 0], A, b[:, 0], c[:, 0], D, bias)
    states = [torch.zeros(B, H, P, N, device="cuda") for _ in range(3)]
    with use_backend("reference"):
        expected = mamba_step(states[0], *token)
    torch.testing.assert_close(mamba_step(states[1], *token), expected)
    torch.testing.assert_close(states[1], states[0])
    step = mamba_ssm_step()
    peers: dict[str, Peer] = {"mamba_ssm": step if isinstance(step, Absent) else lambda: step(states[2], *token)}
    compare(lambda: mamba_step(states[1], *token), Work(bytes=2.0 * states[0].nbytes), peers)


class Core:
    """Inputs of the mixer without its projections: convolution, scan, gate and norm, on in_proj's output."""

    def __init__(self, B: int, L: int, G: int) -> None:
        case = Case(B, L, G)
        bf16 = {"device": "cuda", "dtype": torch.bfloat16}
        self.G, self.splits = G, [H * P, H * P + 2 * G * N, H]  # z, (x, b, c), dt
        _, _, A, _, _, D, bias = case.inputs
        self.inputs: Tensors = (
            torch.randn(B, L, sum(self.splits), **bf16).requires_grad_(),
            (torch.randn(self.splits[1], TAPS, **bf16) / 2).requires_grad_(),
            torch.zeros(self.splits[1], **bf16).requires_grad_(),
            A,
            D,
            bias,
            torch.ones(H * P, **bf16).requires_grad_(),
        )
        self.dy = torch.randn(B, L, H * P, **bf16)
        heads, groups = (2.0 * B * L * n for n in (H * P, G * N))
        conv, scan, norm = 5 * (heads + 2 * groups), 5 * heads + 6 * groups, 8 * heads
        self.work = Work(3 * case.work["forward"].flops, conv + scan + norm)

    def call(self, conv: Scan, scan: Scan, norm: Scan) -> Callable[[], Any]:
        """Return forward and backward of a core made of three functions."""

        def core(
            projected: torch.Tensor,
            taps: torch.Tensor,
            taps_bias: torch.Tensor,
            A: torch.Tensor,
            D: torch.Tensor,
            dt_bias: torch.Tensor,
            weight: torch.Tensor,
        ) -> torch.Tensor:
            z, xbc, dt = projected.split(self.splits, dim=-1)
            x, b, c = conv(xbc, taps, taps_bias).split([H * P, self.G * N, self.G * N], dim=-1)
            b, c = (t.unflatten(-1, (self.G, N)) for t in (b, c))
            y = scan(x.unflatten(-1, (H, P)), dt, A, b, c, D, dt_bias)
            return norm(y.flatten(-2), z, weight, EPS, self.G)

        return lambda: torch.autograd.grad(core(*self.inputs), self.inputs, self.dy)


@torch.compile
def compiled_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Compute the convolution as shifted products, then silu."""
    padded, length = F.pad(x, (0, 0, TAPS - 1, 0)), x.shape[1]
    return F.silu(sum(padded[:, k : k + length] * weight[:, k] for k in range(TAPS)) + bias)


@torch.compile
def compiled_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, groups: int) -> torch.Tensor:
    """Apply the gate and the RMS norm by groups."""
    gated = (y.float() * F.silu(z.float())).unflatten(-1, (groups, -1))
    scaled = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (scaled.flatten(-2) * weight.float()).to(y.dtype)


@pytest.mark.parametrize("groups", [8, 1])
def test_mixer_core(groups: int, compare: Compare) -> None:
    """Time forward and backward of convolution, scan and gated norm; the floor also counts the tensors between them."""
    core = Core(8, 4096, groups)
    scan = peer_scan(256)
    theirs: Peer = scan if isinstance(scan, Absent) else core.call(compiled_conv, scan, compiled_norm)
    three = core.call(causal_conv1d, mamba_scan, gated_rms_norm)

    def ours() -> Tensors:
        return torch.autograd.grad(mamba_core(*core.inputs, groups=groups, eps=EPS), core.inputs, core.dy)

    with use_backend("reference"):
        exact = ours()
    for call in (ours, three):
        for our, expected in zip(call(), exact, strict=True):
            assert (our.double() - expected.double()).norm() <= 2e-2 * expected.double().norm()
    compare(ours, core.work, {"mamba_ssm + torch.compile": theirs, "our three ops": three}, {"peak": peak(ours)})
