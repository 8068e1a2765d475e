"""The report's two panels on the kernels, from the JSON file that `pytest benchmarks/ --benchmark-json` writes."""

import functools
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from yaongi.train.report.curves import Panel
from yaongi.train.report.words import Language, translate

_SHOWN = 24


def kernel_panels(path: Path, language: Language = "en") -> list[Panel]:
    """Return panels with each kernel's share of the roofline and its speed-up over its fastest peer.

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
    shown = {"kernels: share of the roofline": floors, "kernels: × the fastest peer": fastest}
    return [Panel(translate(title, language), functools.partial(_bars, values)) for title, values in shown.items()]


def _speedups(info: dict[str, Any]) -> list[float]:
    return [float(value) for key, value in info.items() if key.startswith("x ")]


def _bars(values: dict[str, float], ax: Axes) -> None:
    shown = dict(list(values.items())[:_SHOWN])
    ax.barh(list(shown), list(shown.values()))
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize=5)
