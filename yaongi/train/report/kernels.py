"""The report's two panels on the kernels, from the JSON file that `pytest benchmarks/ --benchmark-json` writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

_SHOWN = 24


def kernel_panels(path: Path) -> list[Callable[[Axes], None]]:
    """Return functions that draw each kernel's share of the roofline and its speed-up over its fastest peer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON of pytest-benchmark.
    """
    if not path.is_file():
        raise FileNotFoundError(f"report: no benchmark file {path}")
    try:
        found = json.loads(path.read_text())["benchmarks"]
        infos = {b["name"].removeprefix("test_"): b["extra_info"] for b in found}
        floors = {name: float(info["of_floor"]) for name, info in infos.items() if "of_floor" in info}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"report: {path} must be JSON of pytest-benchmark, got {error!r}") from error
    fastest = {name: min(ratios) for name, info in infos.items() if (ratios := _speedups(info))}
    return [
        lambda ax: _bars(ax, floors, "kernels: share of the roofline"),
        lambda ax: _bars(ax, fastest, "kernels: × the fastest peer"),
    ]


def _speedups(info: dict[str, Any]) -> list[float]:
    return [float(value) for key, value in info.items() if key.startswith("x ")]


def _bars(ax: Axes, values: dict[str, float], title: str) -> None:
    shown = dict(list(values.items())[:_SHOWN])
    ax.barh(list(shown), list(shown.values()))
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize=5)
    ax.set(title=title)
