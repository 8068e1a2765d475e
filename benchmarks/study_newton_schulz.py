"""Accuracy of Newton-Schulz in float16: singular values against the polynomial's in float64, and the restart's effect.

`python -m benchmarks.study_newton_schulz [--out docs/newton_schulz.png]` prints a table of ‖Y − p(X)‖₂ and draws the
singular values. The reference computes the kernels' float16 by rounding what they store; on an H100 the kernels' own
results are added.
"""

import argparse
import dataclasses
from pathlib import Path
from unittest import mock

import matplotlib
import torch

from yaongi.kernels import newton_schulz
from yaongi.kernels.newton_schulz import reference
from yaongi.kernels.newton_schulz.op import POLAR_EXPRESS
from yaongi.model import Yaongi, load_preset

Tensor = torch.Tensor
FLAT = [value for step in POLAR_EXPRESS for value in step]
M, N = 256, 512
SEED = 18  # for the `few_tokens` matrix
NEVER = 5
# name: form, steps before the restart, storage
WAYS = {
    "gram": ("gram", reference.RESTART, torch.float16),
    "restart after 1": ("gram", 1, torch.float16),
    "after 3": ("gram", 3, torch.float16),
    "after 4": ("gram", 4, torch.float16),
    "no restart": ("gram", NEVER, torch.float16),
    "gram bf16": ("gram", reference.RESTART, torch.bfloat16),
    "gram fp32, no restart": ("gram", NEVER, None),
    "standard": ("standard", 0, torch.float16),
    "standard bf16": ("standard", 0, torch.bfloat16),
}
DRAWN = {"no restart": "tab:red", "standard": "tab:green", "gram": "tab:blue"}


def with_singular_values(values: Tensor) -> Tensor:
    """Return an M × N matrix with these singular values in random directions."""
    u, v = (torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64)).Q for size in (M, N))
    return (u * values) @ v.T


def trained_gradient() -> Tensor:
    """Return the gradient of a shared expert after 40 steps of a small model on text."""
    config = load_preset("yaongi-tiny")
    config = dataclasses.replace(config, vocab_size=256, hidden_size=N, shared_expert_size=M, engram=())
    model = Yaongi(config, dtype=torch.float32)
    text = torch.tensor(list(Path(reference.__file__).read_bytes()), dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    weight = model.get_parameter("backbone.layers.1.mixer.shared_experts.up_proj.weight")
    for _ in range(40):
        starts = torch.randint(len(text) - 129, (4,)).tolist()
        optimizer.zero_grad()
        losses = model.losses(torch.stack([text[start : start + 128] for start in starts]))
        (losses.cross_entropy_sum / losses.targets).backward()
        optimizer.step()
    assert weight.grad is not None
    return weight.grad.double()


def few_tokens() -> Tensor:
    """Return a matrix like an expert's gradient from few tokens: four directions, uneven rows and columns, noise."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, columns = (1.5 * normal(M, 1)).exp(), (1.5 * normal(1, N)).exp()
    return rows * (normal(M, 4) @ normal(4, N) + 1e-3 * normal(M, N)) * columns


def cases() -> dict[str, Tensor]:
    ones, ranks = torch.ones(M, dtype=torch.float64), torch.arange(1, M + 1, dtype=torch.float64)
    gaussian = torch.randn(M, N, dtype=torch.float64)
    return {
        "Gaussian": gaussian,
        "rank 32": with_singular_values(ones[:32]),
        "condition 1e8": with_singular_values(torch.logspace(0, -8, M, dtype=torch.float64)),
        "σ ~ 1/rank": with_singular_values(1 / ranks),
        "tiny, 1e-35": 1e-35 * gaussian,
        "huge, 1e36": 1e36 * gaussian,
        "zero": torch.zeros(M, N, dtype=torch.float64),
        "a real gradient": trained_gradient(),
        "few tokens": few_tokens(),
    }


def polynomial(values: Tensor) -> Tensor:
    for a, b, c in POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    return values


def computed(x: Tensor, way: str) -> Tensor:
    form, restart, storage = WAYS[way]
    with mock.patch.object(reference, "RESTART", restart):
        return reference.newton_schulz_reference(x.float(), FLAT, form, storage).double()


def results_of(x: Tensor) -> dict[str, Tensor]:
    results = {way: computed(x, way) for way in WAYS}
    if torch.cuda.is_available():
        results["gram on this GPU"] = newton_schulz(x.float().cuda()).double().cpu()
        results["standard on this GPU"] = newton_schulz(x.float().cuda(), form="standard").double().cpu()
    return results


def draw(axis: "matplotlib.axes.Axes", name: str, x: Tensor, results: dict[str, Tensor]) -> None:
    """Plot each resulting singular value against the original one relative to ‖X‖_F."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    relative = s / s.norm().clamp(min=1e-300)
    curve = torch.logspace(-6, 0, 600, dtype=torch.float64)
    axis.plot(curve, polynomial(curve), color="black", linewidth=0.8, label="polynomial, float64")
    for way, color in DRAWN.items():
        values = torch.einsum("mk,mn,kn->k", u, results[way], vt)
        shown = relative > 1e-6
        axis.plot(relative[shown], values[shown], ".", color=color, markersize=2.5, label=way)
    axis.set(xscale="log", xlim=(1e-5, 1), ylim=(-0.3, 1.6), title=name)
    axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/newton_schulz.png"))
    out = parser.parse_args().out
    matplotlib.use("Agg")
    from matplotlib import pyplot

    torch.manual_seed(0)
    figure, axes = pyplot.subplots(3, 3, figsize=(11, 9), sharex=True, sharey=True, layout="constrained")
    rows = []
    for axis, (name, x) in zip(axes.flat, cases().items(), strict=True):
        results = results_of(x)
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        exact = (u * polynomial(s / s.norm().clamp(min=1e-300))) @ vt
        errors = [float(torch.linalg.matrix_norm(result - exact, 2)) for result in results.values()]
        rows.append(f"| {name} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")
        draw(axis, name, x, results)
    print("| ‖Y − p(X)‖₂ | " + " | ".join(results) + " |\n" + "|---" * (len(results) + 1) + "|")
    print("\n".join(rows))
    axes[0, 0].legend(fontsize=7, loc="lower right")
    figure.supxlabel("singular value / ‖X‖_F")
    figure.supylabel("what becomes of it")
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    main()
