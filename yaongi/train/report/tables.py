"""The tables and texts of the report, as HTML."""

import functools
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from yaongi.train.formatting import duration, short, significant
from yaongi.train.report.curves import TURNS
from yaongi.train.report.run import Run
from yaongi.train.report.words import Language, translate

Row = Sequence[str]
Say = Callable[[str], str]


def facts_table(runs: Sequence[Run], language: Language) -> str:
    """Return the main facts, a column for each run."""
    columns = [dict(_facts(run, functools.partial(translate, language=language))) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    head = ["", *(run.name for run in runs)] if len(runs) > 1 else []
    return _table(head, [[name, *(column.get(name, "") for column in columns)] for name in names])


def _facts(run: Run, say: Say) -> Iterable[tuple[str, str]]:
    plan, last = run.plan, run.all_steps[-1]
    if plan:
        sizes = f"{plan['parameters']:,} {say('parameters')}, {plan['active']:,} {say('active')}"
        yield say("model"), f"{plan['preset']}, {sizes}"
        steps = f"{last['step']:,} / {plan['steps']:,} {say('steps')}"
        yield say("trained"), f"{steps}, {short(last['tokens'])} {say('tokens')}"
    yield say("time"), duration(3600 * last["hours"])
    if plan:
        yield say("device"), plan["device"] + (f" × {plan['processes']}" if plan.get("processes", 1) > 1 else "")
    spikes = sum(bool(r.get("spike")) for r in run.all_steps)
    yield say("skipped steps, spikes"), f"{len(run.of('bad_step'))}, {spikes}"
    if "precision" in plan:
        saturated = 100 * max(r.get("fp8_saturated", 0.0) for r in run.all_steps)
        yield say("precision"), f"{plan['precision']}; {say('most casts of a step that saturated')}: {saturated:.1f}%"
    if "loss" in last:
        speed = f"{short(last['tokens_per_second'])} {say('tokens/s')}, {significant(last['tflops'])} TFLOP/s"
        yield say("speed at the end"), speed + (f", MFU {100 * last['mfu']:.1f}%" if "mfu" in last else "")
    for record in run.of("init"):
        yield say("starts from"), _origin(record, say)
    for event in TURNS:
        for record in run.of(event):
            yield f"{say('step')} {record['step']:,}, {say(event)}", _turn(record, say)
    start = (run.of("start") or [{}])[-1]
    for name in ("command", "commit", "versions", "machine", "hosts"):
        if start.get(name):
            yield say(name), start[name]


def _origin(record: Mapping[str, Any], say: Say) -> str:
    """Describe what a run started from."""
    if record["at"] is None:
        return str(record["folder"])
    return f"{record['folder']}, {record['steps']:,} {say('steps')}, {short(record['tokens'])} {say('tokens')}"


def _turn(record: Mapping[str, Any], say: Say) -> str:
    """Describe what sets the steps after a record apart from a straight run."""
    if record["event"] == "changed":
        return ", ".join(f"{name} {old} → {new}" for name, (old, new) in record["fields"].items())
    if record["event"] == "skip_batches":
        first, last = record["samples"]
        return f"{record['batches']} ({say('rows')} {first:,}–{last:,})"
    return ""


def bits_table(run: Run, language: Language) -> str:
    """Return the bits per byte of every evaluation, a row each."""
    evaluations = run.of("evaluation")
    if not evaluations:
        return "<p>" + html.escape(translate("no evaluation was recorded", language)) + "</p>"
    domains = list(evaluations[-1]["bpb"])
    rows = [[f"{r['step']:,}", short(r["tokens"]), *_bits(r["bpb"], domains), _mean(r["bpb"])] for r in evaluations]
    for record in run.of("evaluation_without_fp8"):
        name = translate("without fp8", language)
        rows.append([name, short(record["tokens"]), *_bits(record["bpb"], domains), _mean(record["bpb"])])
    head = [translate("step", language), translate("tokens", language), *domains, translate("mean", language)]
    return _table(head, rows, numbers=True)


def _bits(bits: Mapping[str, float], domains: Sequence[str]) -> list[str]:
    return [f"{bits[domain]:.3f}" if domain in bits else "" for domain in domains]


def _mean(bits: Mapping[str, float]) -> str:
    """Return the mean over the domains; nothing where none has held-out text."""
    return f"{sum(bits.values()) / len(bits):.3f}" if bits else ""


def samples(runs: Sequence[Run], language: Language) -> str:
    """Return the samples side by side: of one run its first, middle and last ones; of several, the last of each."""
    if len(runs) == 1:
        found = runs[0].of("samples")
        places = dict.fromkeys((0, len(found) // 2, len(found) - 1)) if found else {}
        drawn = [(runs[0], found[place]) for place in places]
    else:
        drawn = [(run, run.of("samples")[-1]) for run in runs if run.of("samples")]
    if not drawn:
        return f'<div class="card">{html.escape(translate("no samples were drawn", language))}</div>'
    parts = []
    for name in drawn[0][1]["texts"]:
        cards = "".join(_sample(run if len(runs) > 1 else None, record, name, language) for run, record in drawn)
        parts.append(f'<h3>{html.escape(name)}</h3><div class="grid">{cards}</div>')
    return "".join(parts)


def _sample(run: Run | None, record: Mapping[str, Any], name: str, language: Language) -> str:
    title = f"{translate('step', language)} {record['step']:,}" if run is None else run.name
    text = html.escape(record["texts"].get(name, ""))
    return f'<div class="card"><span class="note">{html.escape(title)}</span><pre>{text}</pre></div>'


def sources_table(run: Run, language: Language) -> str:
    """Return the tokens, share and epochs of each source of text."""
    starts = [r for r in run.of("start") if "sources" in r]
    found: list[dict[str, Any]] = starts[-1]["sources"] if starts else []
    total = sum(source["wanted"] for source in found)
    rows = [
        [s["name"], short(s["there"]), f"{100 * s['wanted'] / total:.1f}%", f"{s['wanted'] / s['there']:.2f}"]
        for s in found
    ]
    return _table(
        [translate(n, language) for n in ("source", "tokens", "share of the text", "epochs")], rows, numbers=True
    )


def settings(runs: Sequence[Run], language: Language) -> str:
    """Return the settings, folded; of several runs those that differ stand first, unfolded."""
    flat = [dict(_flat(run.settings)) for run in runs]
    names = dict.fromkeys(name for one in flat for name in one)
    rows = [[name, *(one.get(name, "") for one in flat)] for name in names]
    head = ["", *(run.name for run in runs)]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    shown = _table(head, differing) if differing else ""
    summary = html.escape(translate("Settings", language))
    return f"{shown}<details><summary>{summary} ({len(rows)})</summary>{_table(head, rows)}</details>"


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    else:
        yield name, str(value)


def _table(head: Row, rows: Sequence[Row], *, numbers: bool = False) -> str:
    kind = ' class="n"' if numbers else ""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{html.escape(first)}</th>" + "".join(f"<td{kind}>{html.escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"
