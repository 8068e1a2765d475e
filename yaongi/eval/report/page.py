"""The page of one or several evaluations: self-contained HTML with a table, pictures, and what they rest on."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from yaongi.eval.basics.suite import GROUP, TASKS
from yaongi.eval.harness.suites import INSTRUCTIONS, PUBLISHED
from yaongi.eval.report.figures import bars, categories, curves, main_metric, members
from yaongi.eval.report.results import RESULTS, read_results
from yaongi.eval.report.table import is_chance, notes, ordered, score_text
from yaongi.files import read_json
from yaongi.pictures import STYLE, embedded

LOGICKOR = "logickor.json"
MANY = 5  # tasks from which on a group gets a picture of its own
CSS = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1240px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.15em .9em .15em 0;text-align:left;vertical-align:top}"
    "thead th{border-bottom:1px solid #999}td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}"
    ".chance{color:#888}.warn{background:#fff3d6;padding:.4em .8em}img{max-width:100%;display:block;margin:1em 0}"
)
Named = Sequence[tuple[str, Mapping[str, Any]]]


def write_page(folders: Sequence[Path], out: Path) -> Path:
    """Write the page.

    Args:
        folders: those that `tasks` or `logickor` wrote, a model each.

    Raises:
        FileNotFoundError: a folder holds no results.
    """
    tasks: list[tuple[str, Mapping[str, Any]]] = []
    talks: list[tuple[str, Mapping[str, Any]]] = []
    for folder, label in zip(folders, _labels(folders), strict=True):
        judged = folder / LOGICKOR
        if (folder / RESULTS).is_file() or not judged.is_file():
            tasks.append((label, read_results(folder)))
        if judged.is_file():
            talks.append((label, read_json(judged)))
    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        parts = [*_task_parts(tasks), *_talk_parts(talks)]
    title = ", ".join(dict.fromkeys(name for name, _ in (*tasks, *talks)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{CSS}</style><h1>Evaluation: {html.escape(title)}</h1>{''.join(parts)}</html>",
        encoding="utf-8",
    )
    return out


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the models' names, where several are equal with the tokens seen, else with a number."""
    found: list[tuple[str, int | None]] = []
    for folder in folders:
        if (folder / RESULTS).is_file() or not (folder / LOGICKOR).is_file():
            model = read_results(folder)["model"]
            found.append((model["name"], model["trained_tokens"]))
        else:
            found.append((read_json(folder / LOGICKOR)["model"], None))
    names = [name for name, _ in found]
    labels = []
    for number, (name, tokens) in enumerate(found, 1):
        told_apart = f"{name} {tokens / 1e6:,.0f}M" if tokens else f"{name} ({number})"
        labels.append(told_apart if names.count(name) > 1 else name)
    return labels


def _task_parts(models: Named) -> list[str]:
    if not models:
        return []
    warnings = [f'<p class="warn">{html.escape(n)}: {html.escape(w)}</p>' for n, r in models for w in _warnings(r)]
    parts = [*warnings, _scores(models), _image(bars(models, PUBLISHED), "scores by task")]
    first = models[0][1]["tasks"]
    parts += [
        _image(members(name, models), f"tasks of {name}")
        for name, entry in first.items()
        if len(entry.get("tasks", ())) >= MANY and main_metric(entry)
    ]
    seen = {results["model"]["trained_tokens"] for _, results in models} - {None}
    if len(seen) > 1:
        shared = [n for d, n in ordered(first) if not d and sum(n in r["tasks"] for _, r in models) > 1]
        parts += [_image(curves(models, name), f"{name} against tokens") for name in shared if first[name]["metrics"]]
    if GROUP in first:
        about = "".join(f"<tr><th>{task}</th><td>{html.escape(what)}</td></tr>" for task, (what, _) in TASKS.items())
        parts.append(
            "<h2>What “basics” asks</h2><p>Ours, written for this project and seeded: four choices, 400 questions a "
            "task, no examples in the prompt. It measures the forms of Korean, simple sums, copying and names in code, "
            f"not knowledge: its scores move long before KMMLU's do.</p><table>{about}</table>"
        )
    if INSTRUCTIONS.task in first:
        parts.append(
            "<h2>What “instructions” asks</h2><p>Ours, for models tuned on chats: the held-out conversations of "
            "embedded:instructions, whose words no training conversation has. An answer is right if it is the only "
            "right one to the letter, and ends by itself.</p>"
        )
    return [*parts, _models(models)]


def _scores(models: Named) -> str:
    """Return the table of scores, a column a model."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in models)
    rows = []
    names = dict.fromkeys((depth, name) for _, results in models for depth, name in ordered(results["tasks"]))
    for depth, name in names:
        entries = [results["tasks"].get(name) for _, results in models]
        known = next(entry for entry in entries if entry)
        metrics = dict.fromkeys(metric for entry in entries if entry for metric in entry["metrics"])
        for number, metric in enumerate(metrics):
            cells = "".join(_cell(entry, metric) for entry in entries)
            label = f'<span style="padding-left:{1.2 * depth}em">{html.escape(name)}</span>' if not number else ""
            shots = "" if number or known.get("shots") is None else known["shots"]
            count = "" if number else f"{known['n']:,}"
            rows.append(
                f'<tr><td>{label}</td><td class="n">{shots}</td><td class="n">{count}</td><td>{metric}</td>{cells}'
            )
    titles = "<th>task</th><th>shots</th><th>n</th><th>metric</th>"
    return (
        f"<table><thead><tr>{titles}{head}</tr></thead><tbody>{'</tr>'.join(rows)}</tr></tbody></table>"
        "<p>Grey: not to be told from guessing (below 2 standard errors). In brackets: nats between the right answer "
        "and the mean of the others, and bits per byte of the right answer.</p>"
    )


def _cell(entry: Mapping[str, Any] | None, metric: str) -> str:
    if entry is None or metric not in entry["metrics"]:
        return "<td></td>"
    value = entry["metrics"][metric]
    text = html.escape(score_text(value, metric))
    if metric == next(iter(entry["metrics"])) and "margin" in entry:
        text += f" [{entry['margin']:+.2f}, {entry['bits_per_byte']:.2f}]"
    return f'<td class="n{" chance" if is_chance(value) else ""}">{text}</td>'


def _warnings(results: Mapping[str, Any]) -> list[str]:
    """Return the notes that change how scores are to be read: the last note is about speed."""
    return [note for note in notes(results) if "tokens/s" not in note]


def _models(models: Named) -> str:
    """Return a table of what the numbers rest on."""
    rows: dict[str, list[str]] = {}
    for _, results in models:
        model, run = results["model"], results["runs"][-1]
        seen = model["trained_tokens"]
        for key, text in {
            "weights": model["weights"][:16],
            "tokenizer": model["tokenizer"][:16],
            "parameters": f"{model['parameters']:,}",
            "tokens seen": f"{seen:,}" if seen else "unknown",
            "date": run["date"],
            "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
            "run": f"{run['dtype']} on {run['device']}, {run['processes']} × {run['rows_per_pass']} rows a pass",
            "speed": f"{run['tokens_per_second']:,.0f} tokens/s, rows {100 * run['fill']:.1f}% full",
            "prompts": f"chat format {run['chat'][:12]}" if run["chat"] else f"plain, prefix {run['prefix']}",
        }.items():
            rows.setdefault(key, []).append(text)
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in models)
    body = "".join(
        f"<tr><th>{key}</th>{''.join(f'<td>{html.escape(text)}</td>' for text in texts)}</tr>"
        for key, texts in rows.items()
    )
    return f"<h2>Models</h2><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _talk_parts(models: Named) -> list[str]:
    """Return LogicKor's part, where there is one."""
    if not models:
        return []
    rows = []
    for name, found in models:
        for mode, entry in found["modes"].items():
            cells = [name, mode, *(_mean(entry[key]) for key in ("single", "multi", "overall", "as_published"))]
            cells += [f"{entry['judged']} of {entry['answers']}", str(entry["failed"]), found["judge"], found["date"]]
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    titles = ("model", "mode", "single", "multi", "overall", "as published", "judged", "failed", "judge", "date")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return [
        f"<h2>LogicKor</h2><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        "<p>Scores of other judges are on another scale. “As published” counts a failed judgement as 0, as the "
        "protocol's own program does.</p>",
        _failures(models),
        _image(categories([(name, found) for name, found in models if found["categories"]]), "LogicKor by category")
        if any(found["categories"] for _, found in models)
        else "",
    ]


def _failures(models: Named) -> str:
    """Return a list of the judgements that failed, and why."""
    lines = []
    for name, found in models:
        for failed in found["failures"]:
            said = f"{name}: {failed['mode']} {failed['id']} {failed['turn']}: {failed['why']}"
            lines.append(f"<li>{html.escape(said)}</li>")
    if not lines:
        return ""
    return f"<details><summary>{len(lines)} judgements failed</summary><ul>{''.join(lines)}</ul></details>"


def _mean(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _image(image: bytes, what: str) -> str:
    return f'<img alt="{html.escape(what)}" src="{embedded(image)}">'
