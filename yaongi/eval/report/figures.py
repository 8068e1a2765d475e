"""The pictures of an evaluation: bars by task, a group's tasks, curves over checkpoints, LogicKor by category."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from yaongi.eval.report.table import ordered
from yaongi.pictures import png

Results = Mapping[str, Any]
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")
_THIN = {"linewidth": 0.8}
_LINES = ("-.", ":", "--")
SHARES = ("acc", "exact_match", "exact_match (flexible-extract)", "pass@1", "pass_at_1")


def main_metric(entry: Mapping[str, Any]) -> str | None:
    """Return the metric that a picture shows of a task, a share; None if it has none."""
    return next((metric for metric in (*SHARES, *entry["metrics"]) if metric in entry["metrics"]), None)


def bars(models: Sequence[tuple[str, Results]], published: Mapping[str, Mapping[str, float]]) -> bytes:
    """Draw the tasks and groups at the top, a bar a model, with chance and what published models reached.

    Args:
        models: the models' names and results.
        published: scores of other models, by task.
    """
    names = list(dict.fromkeys(n for _, r in models for depth, n in ordered(r["tasks"]) if not depth and _shown(r, n)))
    figure = Figure(figsize=(max(6.0, 1.6 + 1.5 * len(names)), 3.2), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / len(models)
    for number, (model, results) in enumerate(models):
        _model_bars(ax, names, number, width, model, results)
    styles: dict[str, str] = {}
    for place, name in enumerate(names):
        chance = _chance(models, name)
        if chance is not None:
            ax.hlines(100 * chance, place - 0.45, place + 0.45, color="black", linewidth=1, label="chance")
        for other, value in published.get(name, {}).items():
            styles.setdefault(other, _LINES[len(styles) % len(_LINES)])
            ax.hlines(100 * value, place - 0.45, place + 0.45, color="tab:gray", linestyle=styles[other], label=other)
    ax.set_xticks(range(len(names)), names, rotation=0 if len(names) < 8 else 30)
    ax.set(
        title="scores, with standard errors", ylabel="per cent", ylim=(0, 100), xlim=(-0.6, max(len(names), 3) - 0.4)
    )
    ax.grid(axis="x", visible=False)
    _legend(ax)
    return png(figure)


def members(group: str, models: Sequence[tuple[str, Results]]) -> bytes:
    """Draw the tasks of a group, such as KMMLU's subjects, the best of the first model at the top."""
    entries = [results["tasks"] for _, results in models]
    leaves = [n for n in entries[0][group]["tasks"] if n in entries[0] and _shown({"tasks": entries[0]}, n)]
    leaves.sort(key=lambda n: entries[0][n]["metrics"][_metric(entries[0][n])]["value"])
    figure = Figure(figsize=(7.5, 1.0 + 0.19 * len(leaves) * max(1, len(models) * 0.7)), layout="constrained")
    ax = figure.subplots()
    height = 0.8 / len(models)
    for number, (model, results) in enumerate(models):
        found = [(i, results["tasks"][n]) for i, n in enumerate(leaves) if n in results["tasks"]]
        values = [entry["metrics"][_metric(entry)] for _, entry in found]
        places = np.array([i for i, _ in found]) + (number - (len(models) - 1) / 2) * height
        errors = [100 * (value["stderr"] or 0) for value in values]
        colour = _COLOURS[number % len(_COLOURS)]
        ax.barh(
            places,
            [100 * v["value"] for v in values],
            height,
            xerr=errors,
            error_kw=_THIN,
            color=colour,
            alpha=0.8,
            label=model,
        )
    chances = [entries[0][n]["metrics"][_metric(entries[0][n])]["chance"] for n in leaves]
    if leaves and None not in chances:
        ax.plot([100 * chance for chance in chances], range(len(leaves)), color="black", linewidth=1, label="chance")
    prefix = f"{group}_"
    ax.set_yticks(range(len(leaves)), [n.removeprefix(prefix) for n in leaves])
    ax.set(title=f"{group}: {len(leaves)} tasks", xlabel="per cent", ylim=(-0.6, len(leaves) - 0.4))
    ax.grid(axis="y", visible=False)
    _legend(ax, loc="lower right")
    return png(figure)


def curves(models: Sequence[tuple[str, Results]], task: str) -> bytes:
    """Draw accuracy, margin and bits per byte of a task against the tokens that the models have seen."""
    found = sorted(
        (results["model"]["trained_tokens"] / 1e6, results["tasks"][task])
        for _, results in models
        if results["model"]["trained_tokens"] and task in results["tasks"]
    )
    tokens = [x for x, _ in found]
    figure = Figure(figsize=(9.5, 2.6), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    metric = _metric(found[0][1])
    values = [entry["metrics"][metric] for _, entry in found]
    first.errorbar(tokens, [100 * v["value"] for v in values], [100 * (v["stderr"] or 0) for v in values], marker=".")
    if values[0]["chance"] is not None:
        first.axhline(100 * values[0]["chance"], color="black", linewidth=1, label="chance")
        first.legend()
    first.set(title=f"{task}: {metric.split(' ')[0]}, per cent", xlabel="million tokens")
    for ax, key, title in (
        (second, "margin", "margin of the right answer, nats"),
        (third, "bits_per_byte", "bits per byte of the right answer"),
    ):
        if all(key in entry for _, entry in found):
            ax.plot(tokens, [entry[key] for _, entry in found], ".-")
            ax.set(title=title, xlabel="million tokens")
        else:
            ax.set_visible(False)
    return png(figure)


def categories(models: Sequence[tuple[str, Mapping[str, Any]]]) -> bytes:
    """Draw LogicKor's scores by category, single and multi turn, 1 to 10."""
    names = list(models[0][1]["categories"])
    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    width = 0.8 / len(models)
    for ax, turn in zip(axes, ("single", "multi"), strict=True):
        for number, (model, found) in enumerate(models):
            places = np.arange(len(names)) + (number - (len(models) - 1) / 2) * width
            values = [found["categories"].get(name, {}).get(turn) or 0 for name in names]
            ax.bar(places, values, width, color=_COLOURS[number % len(_COLOURS)], alpha=0.8, label=model)
        ax.set_xticks(range(len(names)), [_in_english(name) for name in names], rotation=20)
        ax.set(title=f"{turn} turn", ylim=(0, 10))
        ax.grid(axis="x", visible=False)
    _legend(axes[0])
    return png(figure)


def _model_bars(ax: Axes, names: Sequence[str], number: int, width: float, model: str, results: Results) -> None:
    places, values, errors = [], [], []
    for place, name in enumerate(names):
        if name in results["tasks"]:
            value = results["tasks"][name]["metrics"][_metric(results["tasks"][name])]
            places.append(place - 0.4 + (number + 0.5) * width)
            values.append(100 * value["value"])
            errors.append(100 * (value["stderr"] or 0))
    drawn = ax.bar(
        places,
        values,
        width,
        yerr=errors,
        error_kw=_THIN,
        color=_COLOURS[number % len(_COLOURS)],
        alpha=0.8,
        label=model,
    )
    ax.bar_label(drawn, fmt="%.1f", padding=2, fontsize=7)


def _in_english(category: str) -> str:
    """Return what a category's name has in brackets, which every font can draw; the name itself where it has none."""
    bracketed = re.search(r"\(([ -~]+)\)", category)
    return bracketed[1] if bracketed else category


def _metric(entry: Mapping[str, Any]) -> str:
    return main_metric(entry) or next(iter(entry["metrics"]))


def _shown(results: Results, name: str) -> bool:
    """Return whether a task has a share to draw."""
    metric = main_metric(results["tasks"][name])
    return metric is not None and metric.startswith(("acc", "exact_match", "pass", "f1"))


def _chance(models: Sequence[tuple[str, Results]], name: str) -> float | None:
    entries = [results["tasks"][name] for _, results in models if name in results["tasks"]]
    return entries[0]["metrics"][_metric(entries[0])]["chance"]


def _legend(ax: Axes, **where: Any) -> None:
    """Draw the legend, each name once."""
    handles, labels = ax.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    if named:
        ax.legend(named.values(), named.keys(), **where)
