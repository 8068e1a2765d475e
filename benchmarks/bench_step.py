"""The kernels of a step of generation, by the bytes that they must read, beside the ways for many rows."""

from collections.abc import Callable

import pytest
import torch
from measure import Compare, Peer, Work, recorded
from oracle import assert_close

from yaongi.kernels import causal_conv1d_step, linear_step, moe, moe_route, use_backend
from yaongi.kernels.moe import dispatch, experts_forward, grouped_gemm

D, F, E, K = 2048, 512, 64, 6  # the flagship's experts
bf16 = {"device": "cuda", "dtype": torch.bfloat16}


@pytest.mark.parametrize("T", [1, 8, 64])
def test_experts(T: int, compare: Compare) -> None:
    """Time the experts of T tokens against reading each chosen one once; the peer is the way for many tokens."""
    torch.manual_seed(0)
    x, w_up, w_down = torch.randn(T, D, **bf16), torch.randn(E, F, D, **bf16) / D**0.5, torch.randn(E, D, F, **bf16)
    ids, weights, load = moe_route(torch.randn(T, E, device="cuda"), torch.zeros(E, device="cuda"), K, 2.5)

    def dispatched() -> torch.Tensor:
        plan = dispatch.dispatch(ids, E)
        a = experts_forward.moe_up(x, w_up, plan)
        return dispatch.moe_combine(grouped_gemm.moe_grouped_gemm(a, w_down, plan, weights), plan.row, T, K)

    y = moe(x, w_up, w_down, ids, weights)
    with use_backend("reference"):
        exact = moe(x.double(), w_up.double(), w_down.double(), ids, weights.double())
        assert_close(y, exact, moe(x, w_up, w_down, ids, weights))
    work = Work(bytes=4.0 * D * F * int((load > 0).sum()))
    compare(recorded(lambda: moe(x, w_up, w_down, ids, weights)), work, {"dispatched": recorded(dispatched)})


@pytest.mark.parametrize("T", [1, 8, 16])
@pytest.mark.parametrize("shape", [(2048, 10304), (4096, 2048), (2048, 1024), (2048, 512), (2048, 32768)], ids=str)
def test_product(shape: tuple[int, int], T: int, compare: Compare) -> None:
    """Time a projection of T rows against reading its weight; the peer is torch's product."""
    inner, width = shape
    x, weight = torch.randn(T, inner, **bf16), torch.randn(width, inner, **bf16) / inner**0.5
    plain = torch.nn.functional.linear(x, weight)
    assert_close(linear_step(x, weight), torch.nn.functional.linear(x.double(), weight.double()), plain)
    peers: dict[str, Peer] = {"torch": recorded(lambda: torch.nn.functional.linear(x, weight))}
    compare(recorded(lambda: linear_step(x, weight)), Work(bytes=2.0 * weight.numel()), peers)


@pytest.mark.parametrize("B", [1, 64])
def test_convolution(B: int, compare: Compare) -> None:
    """Time a Mamba layer's convolution of one token per row."""
    x, state, weight, bias = (torch.randn(*shape, **bf16) for shape in ((B, 6144), (B, 6144, 3), (6144, 4), (6144,)))

    def step() -> Callable[[], None]:
        return recorded(lambda: causal_conv1d_step(x, state, weight, bias))

    with use_backend("reference"):
        reference = step()
    work = Work(bytes=2.0 * (2 * state.numel() + 2 * x.numel() + weight.numel() + bias.numel()))
    compare(step(), work, {"reference": reference})
