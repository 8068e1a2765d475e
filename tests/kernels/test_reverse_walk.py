"""Check the scan's backward pass in CUDA against float64, in segments and slices, and with infinities, on an H100."""

from typing import Any

import pytest
import torch
from mamba_support import OPTIONAL, arguments, positional
from support import converted
from test_mamba_scan_gpu import assert_near

from yaongi.kernels.backend import OPS, unavailable
from yaongi.kernels.mamba_scan import reverse_walk, scan_backward

pytestmark = pytest.mark.gpu

Tensor = torch.Tensor
NAMES = ("dx", "ddt", "dA", "db", "dc", "dD", "ddt_bias", "dinitial_state")
CASES = {  # B, H, G; L, document lengths, absent arguments
    "flagship's heads": ((2, 64, 8), 512, None, ("initial_state",)),
    "documents": ((2, 16, 2), 1000, (300, 1, 339, 64, 296), ()),
    "no optional arguments": ((1, 8, 1), 257, None, OPTIONAL),
    "four heads a group, one segment": ((3, 8, 2), 130, (100, 30), ()),
    "one token": ((2, 16, 2), 1, None, ()),
    "a chunk": ((1, 8, 1), 64, None, ()),
    "a chunk and a token": ((1, 8, 1), 65, (64, 1), ()),
    "many segments": ((1, 8, 1), 9000, (1000, 7000, 1000), ()),
}


@pytest.fixture(autouse=True)
def library() -> None:
    """Load the kernels, which a call past the choice of a backend relies on."""
    assert unavailable("cuda") is None, unavailable("cuda")


def call(case: str) -> list[Any]:
    """Return arguments of the backward op."""
    (B, H, G), L, documents, absent = CASES[case]
    torch.manual_seed(0)
    args = arguments((B, H, 64, G, 128), L, documents, absent, dtype=torch.bfloat16, device="cuda")
    dy = torch.randn(B, L, H, 64, device="cuda").bfloat16()
    dfinal_state = None if "initial_state" in absent else torch.randn(B, H, 64, 128, device="cuda")
    return [dy, dfinal_state, *positional(args)]


def run(backend: Any, args: list[Any]) -> dict[str, Tensor]:
    """Return the gradients that a backend computes."""
    results = OPS["mamba_scan_backward"].implementation(backend)(*args)
    return {name: t for name, t in zip(NAMES, results, strict=True) if t.numel()}


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str) -> None:
    """All gradients are near float64's, and two calls give the same bits."""
    args = call(case)
    assert OPS["mamba_scan_backward"].pick(tuple(args)) == "cuda"
    once, twice = run("cuda", args), run("cuda", args)
    for name in once:
        assert torch.equal(once[name], twice[name]), name
    assert_near(once, run("reference", converted(args, torch.Tensor.double)), run("reference", args), case)


def test_segments_and_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequence in one segment or in many, all groups at once or one after another."""
    args = call("many segments")
    exact, plain = run("reference", converted(args, torch.Tensor.double)), run("reference", args)
    for blocks in (1, 3, 1000):
        monkeypatch.setattr(reverse_walk, "BLOCKS", blocks)
        assert_near(run("cuda", args), exact, plain, f"{blocks} blocks")
    args = call("flagship's heads")
    whole = run("cuda", args)
    monkeypatch.setattr(reverse_walk, "STATES_BYTES", 1.0)
    monkeypatch.setattr(scan_backward, "STATES_BYTES", 1.0)
    assert_near(run("cuda", args), {n: t.double() for n, t in whole.items()}, whole, "a group at a time")


@pytest.mark.parametrize("broken", ["dy", "dfinal_state", "x", "dt", "b", "c"])
def test_what_is_not_finite_stays_in_its_document(broken: str) -> None:
    """An infinity in one document changes no other document, and no other row."""
    args = call("documents")
    good = run("cuda", args)
    place = {"dy": 0, "dfinal_state": 1, "x": 2, "dt": 3, "b": 5, "c": 6}[broken]
    args[place] = args[place].clone()
    args[place][(0, 500, 1) if broken != "dfinal_state" else (0, 3, 5)] = torch.inf
    documents = args[9][0]
    reached = documents == documents[-1 if broken == "dfinal_state" else 500]
    for name, t in run("cuda", args).items():
        if name in ("dx", "ddt", "db", "dc"):
            assert torch.equal(t[1], good[name][1]), name
            kept, wanted = t[0][~reached].float(), good[name][0][~reached].float()
            assert (kept - wanted).norm() <= 1e-2 * wanted.norm(), name
            assert not t[0][reached].isfinite().all(), name


def test_other_sizes_are_left_to_triton() -> None:
    def choice(sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> str:
        args = arguments(sizes, 70, dtype=dtype, device="cuda")
        return OPS["mamba_scan_backward"].pick((args["x"], None, *positional(args)))

    assert choice((1, 8, 64, 1, 128), torch.bfloat16) == "cuda"
    for sizes in ((1, 8, 32, 1, 128), (1, 8, 64, 1, 64), (1, 6, 64, 1, 128), (1, 16, 64, 1, 128)):
        assert choice(sizes, torch.bfloat16) == "triton"
    assert choice((1, 8, 64, 1, 128), torch.float16) == "triton"


def test_the_mixers_core_takes_it() -> None:
    """The core's backward pass writes into slices: its gradients are those that Triton's walk gives, to rounding."""
    torch.manual_seed(0)
    B, L, H, P, G, N = 2, 300, 16, 64, 2, 128
    width, channels = H * P, H * P + 2 * G * N
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    projected = torch.randn(B, L, width + channels + H, **bf16)
    taps, taps_bias, weight = torch.randn(channels, 4, **bf16), torch.randn(channels, **bf16), torch.ones(width, **bf16)
    A, D, dt_bias = -torch.rand(H, device="cuda"), torch.randn(H, device="cuda"), torch.randn(H, device="cuda")
    documents = (torch.arange(L, device="cuda") // 130).int().expand(B, L).contiguous()
    inputs = (projected, taps, taps_bias, A, D, dt_bias, weight, documents, G, 1e-5)
    _, xbc, scanned = OPS["mamba_core"].implementation("triton")(*inputs)
    args = (torch.randn(B, L, width, **bf16), xbc, scanned, *inputs)
    op = OPS["mamba_core_backward"]
    assert op.pick(args) == "cuda"
    for got, wanted in zip(op.implementation("cuda")(*args), op.implementation("triton")(*args), strict=True):
        assert (got.float() - wanted.float()).norm() <= 1e-2 * wanted.float().norm()


def test_cuda_graph() -> None:
    args = call("documents")
    expected = run("cuda", args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run("cuda", args)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(captured[name], t) for name, t in expected.items())
