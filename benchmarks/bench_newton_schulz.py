"""Newton-Schulz at the flagship's shapes, against torch's products and the gram-newton-schulz package."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import Absent, Compare, Peer, Work, peak_gb
from oracle import assert_close

from yaongi.kernels import newton_schulz
from yaongi.kernels.newton_schulz.op import POLAR_EXPRESS
from yaongi.kernels.newton_schulz.reference import newton_schulz_reference

# batch, rows, columns, by their place in yaongi-4b
FLAGSHIP = {
    "experts": (64, 512, 2048),
    "z, x, out_proj": (66, 2048, 4096),
    "B, C, shared": (88, 1024, 2048),
    "attention out": (8, 2048, 2048),
    "Teon pairs of Q": (4, 2048, 4096),
    "Teon pairs of K, V": (8, 512, 4096),
}
OTHERS = {
    "experts, down": (64, 2048, 512),
    "narrow experts": (64, 256, 2048),
    "whole in_proj": (8, 2048, 8512),
    "4096²": (1, 4096, 4096),
    "8192²": (1, 8192, 8192),
}
Tensor = torch.Tensor


def torch_standard(x: Tensor) -> Tensor:
    """Run the standard form as most trainers write it: bf16, three products per step."""
    wide = (x.mT if x.shape[-2] > x.shape[-1] else x).bfloat16()
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide.mT if x.shape[-2] > x.shape[-1] else wide).to(x.dtype)


def gram_newton_schulz(*, gram: bool) -> Peer:
    """Return the gram-newton-schulz package's function if it is installed."""
    if importlib.util.find_spec("gram_newton_schulz") is None:
        return Absent("pip install gram-newton-schulz")
    from gram_newton_schulz import GramNewtonSchulz

    return GramNewtonSchulz(ns_coefficients=list(POLAR_EXPRESS), use_gram_newton_schulz=gram)


def emerging_optimizers() -> Callable[[Tensor], Any] | Absent:
    """Return NVIDIA's, per matrix as its Muon calls it: bf16 operands, half of each symmetric product by Triton."""
    if importlib.util.find_spec("emerging_optimizers") is None:
        return Absent("pip install git+https://github.com/NVIDIA-NeMo/Emerging-Optimizers")
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz as theirs

    steps = {"steps": len(POLAR_EXPRESS), "coefficient_type": "custom", "custom_coefficient_sets": list(POLAR_EXPRESS)}

    def call(x: Tensor) -> list[Tensor]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        results = [theirs(matrix.float(), **steps, use_syrk=True) for matrix in x]
        torch.set_float32_matmul_precision(before)
        return results

    return call


def work_of(batch: int, m: int, n: int) -> Work:
    """Return m³·(14 + 6α) FLOPs per matrix (Gram form, symmetric products by half), and bytes of bf16 x and result."""
    m, n = sorted((m, n))
    return Work(batch * m**3 * (14 + 6 * n / m), 4 * batch * m * n)


def check(x: Tensor) -> None:
    """Check the tolerance rule (tests/oracle.py) for one matrix of the batch, in both forms."""
    flat = [value for step in POLAR_EXPRESS for value in step]
    for form in ("gram", "standard"):
        exact = newton_schulz_reference(x.double(), flat, form)
        assert_close(newton_schulz(x, form=form), exact, newton_schulz_reference(x, flat, form, torch.float16))


@pytest.mark.parametrize("name", [*FLAGSHIP, *OTHERS])
def test_newton_schulz(name: str, compare: Compare) -> None:
    """Time five steps with bf16 in and out, including norm and casts."""
    shape = (FLAGSHIP | OTHERS)[name]
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    if shape[1] <= 4096:
        check(x[:1])
    packages = {"gram-newton-schulz": True, "its standard form": False}
    peers: dict[str, Peer] = {"torch": lambda: torch_standard(x), "compiled": _compiled(x)}
    for label, gram in packages.items():
        peer = gram_newton_schulz(gram=gram)
        peers[label] = peer if isinstance(peer, Absent) else (lambda peer=peer: peer(x))
    nvidias = emerging_optimizers()
    peers["emerging-optimizers"] = nvidias if isinstance(nvidias, Absent) else (lambda: nvidias(x))
    peers["our standard form"] = lambda: newton_schulz(x, form="standard")
    notes = {"shape": str(shape), "peak": f"{peak_gb(lambda: newton_schulz(x)):.2f} GB"}
    compare(lambda: newton_schulz(x), work_of(*shape), peers, notes)


def _compiled(x: Tensor) -> Callable[[], Tensor]:
    compiled = torch.compile(torch_standard)
    return lambda: compiled(x)
