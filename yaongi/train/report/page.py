"""`report.html`, which is self-contained, and `report.png`, from `metrics.jsonl`."""

import html
from pathlib import Path
from typing import Any

import matplotlib

from yaongi.pictures import STYLE, embedded
from yaongi.train.formatting import duration, short, significant
from yaongi.train.metrics.records import plan_record, read_metrics
from yaongi.train.report.curves import TURNS, curve_panels, draw
from yaongi.train.report.kernels import kernel_panels
from yaongi.train.run_folder import METRICS, REPORT_HTML, REPORT_PNG

Records = list[dict[str, Any]]


def write_report(folder: Path, benchmarks: Path | None = None) -> Path:
    """Write `report.html` and `report.png` of the run in `folder`.

    Args:
        benchmarks: JSON file of `pytest benchmarks/ --benchmark-json`; adds two panels on the kernels.

    Returns:
        The path of `report.html`.

    Raises:
        FileNotFoundError: there is no `metrics.jsonl`, or no benchmark file.
        ValueError: no step was recorded.
    """
    if not (folder / METRICS).is_file():
        raise FileNotFoundError(f"report: no {METRICS} in {folder}; train first")
    records = read_metrics(folder / METRICS)
    steps = [r for r in records if r["event"] == "step"]
    if not steps:
        raise ValueError(f"report: no step is recorded in {folder / METRICS}")
    panels = curve_panels(records, steps)
    if benchmarks is not None:
        panels += kernel_panels(benchmarks)
    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        image = draw(panels)
    (folder / REPORT_PNG).write_bytes(image)
    page = _page(folder, records, steps, image)
    (folder / REPORT_HTML).write_text(page, encoding="utf-8")
    return folder / REPORT_HTML


def _page(folder: Path, records: Records, steps: Records, image: bytes) -> str:
    """Return the HTML, with the picture and the samples embedded."""
    facts = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in _facts(records, steps))
    name = html.escape(folder.resolve().name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1240px;margin:2em auto;padding:0 1em}"
        "th{text-align:left;padding-right:2em;font-weight:600;vertical-align:top}img{width:100%}"
        "pre{white-space:pre-wrap;background:#f4f4f4;padding:1em}</style>"
        f"<h1>{name}</h1><table>{facts}</table>"
        f'<img alt="curves of the run" src="{embedded(image)}">'
        f"<h2>Bits per byte</h2>{_bits_table(records)}<h2>Samples</h2>{_samples(records)}</html>"
    )


def _facts(records: Records, steps: Records) -> list[tuple[str, str]]:
    plan, last = plan_record(records), steps[-1]
    bad = sum(r["event"] == "bad_step" for r in records)
    facts = [
        ("model", f"{plan['preset']}, {plan['parameters']:,} parameters, {plan['active']:,} active"),
        ("trained", f"{last['step']:,} of {plan['steps']:,} steps, {short(last['tokens'])} tokens"),
        ("time", duration(3600 * last["hours"])),
        ("device", plan["device"]),
        ("skipped steps, spikes", f"{bad}, {sum(bool(r.get('spike')) for r in steps)}"),
    ]
    facts += [("starts from", _origin(r)) for r in records if r["event"] == "init"]
    facts += [(f"step {r['step']}", _turn(r)) for r in records if r["event"] in TURNS]
    if "precision" in plan:
        saturated = max(r.get("fp8_saturated", 0.0) for r in steps)
        facts.append(("precision", f"{plan['precision']}; up to {100 * saturated:.1f}% of a step's casts saturated"))
    if "loss" in last:
        speed = f"{short(last['tokens_per_second'])} tokens/s, {significant(last['tflops'])} TFLOP/s"
        facts.append(("speed at the end", speed + (f", MFU {100 * last['mfu']:.1f}%" if "mfu" in last else "")))
    return facts


def _origin(record: dict[str, Any]) -> str:
    """Describe what a run started from."""
    if record["at"] is None:
        return str(record["folder"])
    return f"{record['folder']}, after {record['steps']:,} steps and {short(record['tokens'])} tokens in all"


def _turn(record: dict[str, Any]) -> str:
    """Describe what sets the steps after a record apart from a straight run."""
    if record["event"] == "changed":
        return "changed: " + ", ".join(f"{name} {old} to {new}" for name, (old, new) in record["fields"].items())
    if record["event"] == "skip_batches":
        first, last = record["samples"]
        return f"{record['batches']} batches left out, samples {first:,} to {last:,}"
    return "gone back to this checkpoint"


def _bits_table(records: Records) -> str:
    evaluations = [r for r in records if r["event"] == "evaluation"]
    if not evaluations:
        return "<p>none measured</p>"
    first, last = evaluations[0], evaluations[-1]
    rows: list[tuple[str, ...]] = [("", f"step {first['step']}", f"step {last['step']}")]
    rows += [(d, f"{first['bpb'][d]:.3f}", f"{last['bpb'][d]:.3f}") for d in last["bpb"]]
    without: dict[str, float] = next((r["bpb"] for r in records if r["event"] == "evaluation_without_fp8"), {})
    if without:
        more = ["without fp8", *(f"{value:.3f}" for value in without.values())]
        rows = [(*row, cell) for row, cell in zip(rows, more, strict=True)]
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _samples(records: Records) -> str:
    sampled = [r for r in records if r["event"] == "samples"]
    if not sampled:
        return "<p>none drawn</p>"
    texts = sampled[-1]["texts"].items()
    return "".join(f"<h3>{html.escape(name)}</h3><pre>{html.escape(text)}</pre>" for name, text in texts)
