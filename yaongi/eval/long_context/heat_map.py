"""How many numbers were found again, by length of the text and depth in it: a table and a picture."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from yaongi.pictures import png

Cells = Mapping[tuple[int, float], float]  # length and depth → share of the numbers


def table(cells: Cells) -> str:
    """Return a line for each depth, with per cent by length, and the mean."""
    lengths, depths = _axes(cells)
    lines = ["depth   " + "".join(f"{length:>8,}" for length in lengths)]
    for depth in depths:
        lines.append(f"{depth:<8.2f}" + "".join(f"{100 * cells[length, depth]:>7.0f}%" for length in lengths))
    lines.append(f"found again: {100 * sum(cells.values()) / len(cells):.1f}%")
    return "\n".join(lines)


def heat_map(cells: Cells) -> bytes:
    """Return the picture as a PNG file: lengths to the right, depths downwards."""
    lengths, depths = _axes(cells)
    shares = np.array([[100 * cells[length, depth] for length in lengths] for depth in depths])
    figure = Figure(figsize=(2.4 + 0.6 * len(lengths), 1.4 + 0.35 * len(depths)), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(shares, aspect="auto", cmap="RdYlGn", vmin=0, vmax=100)
    ax.grid(False)
    ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    ax.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
    ax.set(title="numbers found again, per cent", xlabel="tokens of the text", ylabel="depth")
    figure.colorbar(image, ax=ax)
    return png(figure)


def _axes(cells: Cells) -> tuple[list[int], list[float]]:
    return sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})
