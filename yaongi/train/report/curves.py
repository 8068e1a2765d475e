"""The plots of a run."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from yaongi.pictures import png
from yaongi.train.metrics.records import plan_record

Records = list[dict[str, Any]]
_COLUMNS = 4
TURNS = ("from_step", "changed", "skip_batches")  # events that set what follows apart from a straight run


def curve_panels(records: Records, steps: Records) -> list[Callable[[Axes], Any]]:
    """Return one function per panel, which draws it."""
    evaluations = [r for r in records if r["event"] == "evaluation"]
    good = [r for r in steps if "loss" in r]
    hours = _column(good, "hours")
    tokens, flops = _column(good, "tokens"), _column(good, "tokens") * plan_record(records).get("flops_per_token", 0)
    turns = np.array([r["step"] for r in records if r["event"] in TURNS and r["step"]], float)
    per_step = tokens[-1] / good[-1]["step"] if good else 0.0
    panels: list[Callable[[Axes], Any]] = [
        lambda ax: _marked(_loss(ax, tokens / 1e6, good, "million tokens"), turns * per_step / 1e6),
        lambda ax: _bits(ax, evaluations),
        lambda ax: _loss(ax, flops / 1e15, good, "PFLOP"),
        lambda ax: _loss(ax, hours, good, "hours"),
        lambda ax: _marked(_line(ax, good, {"lr": "matrices", "adam_lr": "AdamW"}, "learning rate"), turns),
        lambda ax: _marked(_gradients(ax, good, [r for r in records if r["event"] == "bad_step"]), turns),
        lambda ax: _line(ax, good, {"tokens_per_second": "tokens/s"}, "speed", low=0),
        lambda ax: _memory(ax, good),
    ]
    tasks = [r for r in records if r["event"] == "tasks"]
    if tasks:
        panels += [lambda ax: _tasks(ax, tasks, "acc"), lambda ax: _tasks(ax, tasks, "margin")]
    loads = [r for r in good if "loads" in r]
    if loads:
        panels += [
            lambda ax: _heat_map(ax, loads[-1]),
            lambda ax: _line(ax, loads, {"experts_cv": "σ / mean"}, "variation of the experts' load", low=0),
        ]
    return panels


def draw(panels: Sequence[Callable[[Axes], None]]) -> bytes:
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4.0 * _COLUMNS, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis)
    return png(figure)


def _marked(ax: Axes, places: np.ndarray) -> None:
    """Mark where the run went back, or on with other settings or without some batches."""
    for place in places:
        ax.axvline(place, color="tab:gray", linestyle=":", linewidth=1.2)


def _loss(ax: Axes, x: np.ndarray, good: Records, unit: str) -> Axes:
    loss = _column(good, "loss")
    ax.plot(x, loss, color="tab:blue", alpha=0.3, linewidth=0.8)
    ax.plot(x, _smooth(loss), color="tab:blue")
    ax.set(title="training loss, nats per token", xlabel=unit)
    return ax


def _bits(ax: Axes, evaluations: Records) -> None:
    for domain in evaluations[0]["bpb"] if evaluations else ():
        ax.plot(_column(evaluations, "tokens") / 1e6, [r["bpb"][domain] for r in evaluations], ".-", label=domain)
    ax.set(title="held-out bits per byte", xlabel="million tokens")
    if evaluations:
        ax.legend()


def _tasks(ax: Axes, records: Records, what: str) -> None:
    """Draw each task's curve: per cent right, or nats between the right answer and the mean of the others."""
    tokens = _column(records, "tokens") / 1e6
    for name in records[-1]["scores"]:
        found = [r["scores"][name] for r in records]
        values = [100 * f["metrics"]["acc"]["value"] if what == "acc" else f["margin"] for f in found]
        ax.plot(tokens, values, ".-", linewidth=0.8, label=name)
    title = "tasks: per cent right" if what == "acc" else "tasks: margin of the right answer, nats"
    ax.set(title=title, xlabel="million tokens")
    ax.legend(fontsize=5)


def _line(ax: Axes, good: Records, names: dict[str, str], title: str, low: float | None = None) -> Axes:
    for name, label in names.items():
        ax.plot(_column(good, "step"), _column(good, name), label=label)
    ax.set(title=title, xlabel="step")
    if low is not None:
        ax.set_ylim(low, 1.15 * max(_column(good, name).max() for name in names))
    ax.legend()
    return ax


def _gradients(ax: Axes, good: Records, bad: Records) -> Axes:
    ax.semilogy(_column(good, "step"), _column(good, "gnorm"), linewidth=0.8)
    for mark, records, name in (("v", [r for r in good if r.get("spike")], "loss spike"), ("x", bad, "skipped step")):
        if records:
            ax.plot(_column(records, "step"), np.full(len(records), _column(good, "gnorm").max()), mark, label=name)
            ax.legend()
    ax.set(title=f"gradient norm, {len(bad)} steps skipped", xlabel="step")
    return ax


def _memory(ax: Axes, good: Records) -> None:
    memory = _column(good, "memory") / 1e9
    ax.plot(_column(good, "step"), memory)
    ax.set(title="memory, GB", xlabel="step", ylim=(0, 1.15 * memory.max()))


def _heat_map(ax: Axes, record: dict[str, Any]) -> None:
    loads = np.array(record["loads"], float)
    fair = loads / loads.mean(1, keepdims=True)
    image = ax.imshow(fair, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(title=f"experts' load at step {record['step']}, 1.0 = fair", xlabel="expert", ylabel="MoE layer")


def _column(records: Records, name: str) -> np.ndarray:
    return np.array([r[name] for r in records], float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the trailing mean over a fiftieth of the curve."""
    width = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate(([0.0], values)))
    starts = np.maximum(0, np.arange(1, len(values) + 1) - width)
    ends = np.arange(1, len(values) + 1)
    return (sums[ends] - sums[starts]) / (ends - starts)
