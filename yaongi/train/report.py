"""One page on a run: ``report.html`` (nothing beside it is needed) and ``report.png``, from ``metrics.jsonl``.

``python -m yaongi.train.report RUN_FOLDER`` writes them anew.
"""

import base64
import html
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from yaongi.train.benchmark_panel import kernel_panels
from yaongi.train.log import duration, read_metrics, short, significant
from yaongi.train.names import METRICS, REPORT_HTML, REPORT_PNG

Records = list[dict[str, Any]]
_COLUMNS = 4
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write_report(folder: Path, benchmarks: Path | None = None) -> Path:
    """Draw the run in ``folder``.

    Args:
        benchmarks: JSON of ``pytest benchmarks/ --benchmark-json``; two panels show the kernels.

    Returns:
        The path of ``report.html``.

    Raises:
        FileNotFoundError: there is no ``metrics.jsonl``, or no benchmark file.
        ValueError: no step was recorded.
    """
    if not (folder / METRICS).is_file():
        raise FileNotFoundError(f"report: no {METRICS} in {folder}; train first")
    records = read_metrics(folder / METRICS)
    steps = [r for r in records if r["event"] == "step"]
    if not steps:
        raise ValueError(f"report: no step is recorded in {folder / METRICS}")
    panels = _panels(records, steps)
    if benchmarks is not None:
        panels += kernel_panels(benchmarks)
    matplotlib.use("Agg")
    with matplotlib.rc_context(_STYLE):
        image = _draw(panels)
    (folder / REPORT_PNG).write_bytes(image)
    page = _page(folder, records, steps, image)
    (folder / REPORT_HTML).write_text(page, encoding="utf-8")
    return folder / REPORT_HTML


def _panels(records: Records, steps: Records) -> list[Callable[[Axes], None]]:
    """A function for each picture, which draws it."""
    evaluations = [r for r in records if r["event"] == "evaluation"]
    good = [r for r in steps if "loss" in r]
    hours = _column(good, "hours")
    tokens, flops = _column(good, "tokens"), _column(good, "tokens") * _plan(records).get("flops_per_token", 0)
    panels: list[Callable[[Axes], None]] = [
        lambda ax: _loss(ax, tokens / 1e6, good, "million tokens"),
        lambda ax: _bits(ax, evaluations),
        lambda ax: _loss(ax, flops / 1e15, good, "PFLOP"),
        lambda ax: _loss(ax, hours, good, "hours"),
        lambda ax: _line(ax, good, {"lr": "matrices", "adam_lr": "AdamW"}, "learning rate"),
        lambda ax: _gradients(ax, good, [r for r in records if r["event"] == "bad_step"]),
        lambda ax: _line(ax, good, {"tokens_per_second": "tokens/s"}, "speed", low=0),
        lambda ax: _memory(ax, good),
    ]
    loads = [r for r in good if "loads" in r]
    if loads:
        panels += [
            lambda ax: _heat_map(ax, loads[-1]),
            lambda ax: _line(ax, loads, {"experts_cv": "σ / mean"}, "variation of the experts' load", low=0),
        ]
    return panels


def _draw(panels: Sequence[Callable[[Axes], None]]) -> bytes:
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4.0 * _COLUMNS, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _loss(ax: Axes, x: np.ndarray, good: Records, unit: str) -> None:
    loss = _column(good, "loss")
    ax.plot(x, loss, color="tab:blue", alpha=0.3, linewidth=0.8)
    ax.plot(x, _smooth(loss), color="tab:blue")
    ax.set(title="training loss, nats a token", xlabel=unit)


def _bits(ax: Axes, evaluations: Records) -> None:
    for domain in evaluations[0]["bpb"] if evaluations else ():
        ax.plot(_column(evaluations, "tokens") / 1e6, [r["bpb"][domain] for r in evaluations], ".-", label=domain)
    ax.set(title="held-out bits per byte", xlabel="million tokens")
    if evaluations:
        ax.legend()


def _line(ax: Axes, good: Records, names: dict[str, str], title: str, low: float | None = None) -> None:
    for name, label in names.items():
        ax.plot(_column(good, "step"), _column(good, name), label=label)
    ax.set(title=title, xlabel="step")
    if low is not None:
        ax.set_ylim(low, 1.15 * max(_column(good, name).max() for name in names))
    ax.legend()


def _gradients(ax: Axes, good: Records, bad: Records) -> None:
    ax.semilogy(_column(good, "step"), _column(good, "gnorm"), linewidth=0.8)
    for mark, records, name in (("v", [r for r in good if r.get("spike")], "loss spike"), ("x", bad, "skipped step")):
        if records:
            ax.plot(_column(records, "step"), np.full(len(records), _column(good, "gnorm").max()), mark, label=name)
            ax.legend()
    ax.set(title=f"gradient norm, {len(bad)} steps skipped", xlabel="step")


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
    """A moving mean over a fiftieth of the curve."""
    width = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate(([0.0], values)))
    starts = np.maximum(0, np.arange(1, len(values) + 1) - width)
    ends = np.arange(1, len(values) + 1)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _plan(records: Records) -> dict[str, Any]:
    return next((r for r in records if r["event"] == "plan"), {})


def _page(folder: Path, records: Records, steps: Records, image: bytes) -> str:
    """The HTML, with the picture and the samples inside."""
    facts = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in _facts(records, steps))
    picture = base64.b64encode(image).decode()
    name = html.escape(folder.resolve().name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1240px;margin:2em auto;padding:0 1em}"
        "th{text-align:left;padding-right:2em;font-weight:600;vertical-align:top}img{width:100%}"
        "pre{white-space:pre-wrap;background:#f4f4f4;padding:1em}</style>"
        f"<h1>{name}</h1><table>{facts}</table>"
        f'<img alt="curves of the run" src="data:image/png;base64,{picture}">'
        f"<h2>Bits per byte</h2>{_bits_table(records)}<h2>Samples</h2>{_samples(records)}</html>"
    )


def _facts(records: Records, steps: Records) -> list[tuple[str, str]]:
    plan, last = _plan(records), steps[-1]
    bad = sum(r["event"] == "bad_step" for r in records)
    facts = [
        ("model", f"{plan['preset']}, {plan['parameters']:,} parameters, {plan['active']:,} active"),
        ("trained", f"{last['step']:,} of {plan['steps']:,} steps, {short(last['tokens'])} tokens"),
        ("time", duration(3600 * last["hours"])),
        ("device", plan["device"]),
        ("skipped steps, spikes", f"{bad}, {sum(bool(r.get('spike')) for r in steps)}"),
    ]
    if "loss" in last:
        speed = f"{short(last['tokens_per_second'])} tokens/s, {significant(last['tflops'])} TFLOP/s"
        facts.append(("speed at the end", speed + (f", MFU {100 * last['mfu']:.1f}%" if "mfu" in last else "")))
    return facts


def _bits_table(records: Records) -> str:
    evaluations = [r for r in records if r["event"] == "evaluation"]
    if not evaluations:
        return "<p>none measured</p>"
    first, last = evaluations[0], evaluations[-1]
    rows = [("", f"step {first['step']}", f"step {last['step']}")]
    rows += [(d, f"{first['bpb'][d]:.3f}", f"{last['bpb'][d]:.3f}") for d in last["bpb"]]
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _samples(records: Records) -> str:
    sampled = [r for r in records if r["event"] == "samples"]
    if not sampled:
        return "<p>none drawn</p>"
    texts = sampled[-1]["texts"].items()
    return "".join(f"<h3>{html.escape(name)}</h3><pre>{html.escape(text)}</pre>" for name, text in texts)


def main(arguments: Sequence[str]) -> int:
    """``python -m yaongi.train.report RUN_FOLDER [BENCHMARKS.json]``."""
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m yaongi.train.report RUN_FOLDER [BENCHMARKS.json]", file=sys.stderr)
        return 2
    try:
        print(write_report(Path(arguments[0]), *map(Path, arguments[1:])))
    except (OSError, ValueError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
