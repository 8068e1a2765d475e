"""The panels of the report: curves of one run, or of several over each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from yaongi.train.report.run import Records, Run
from yaongi.train.report.words import Language, translate

TURNS = ("from_step", "changed", "skip_batches")  # events that set what follows apart from a straight run
POINTS = 600  # of a curve, at most: a longer one is averaged
LEGEND = 16  # names of ranks, at most
LATE = 0.8  # share of a run that the scale of its loss shows
OF_TUNING = {  # panel: the event and the field that it shows, and the field's unit
    "answers that end by themselves, %": ("answers", "stop_rate", 0.01),
    "length of answers, tokens": ("answers", "length", 1),
    "pairs told apart, %": ("preferences", "accuracy", 0.01),
}
RAW: dict[str, Any] = {"alpha": 0.25, "linewidth": 0}


@dataclass(frozen=True)
class Panel:
    """A titled plot."""

    title: str
    draw: Callable[[Axes], None]


class Curves:
    """Makes the panels of some runs in a language."""

    def __init__(self, runs: Sequence[Run], language: Language) -> None:
        self._runs, self._language = runs, language

    def _say(self, text: str) -> str:
        return translate(text, self._language)

    def losses(self) -> list[tuple[str, Panel]]:
        """Return the training loss over tokens, over FLOPs and over hours, each with its axis's name."""
        axes: dict[str, Callable[[Run], np.ndarray]] = {
            "million tokens": lambda run: run.column("tokens") / 1e6,
            "PFLOP": lambda run: run.column("tokens") * run.plan.get("flops_per_token", 0) / 1e15,
            "hours": lambda run: run.column("hours"),
        }
        return [(self._say(unit), self._loss(unit, axis)) for unit, axis in axes.items()]

    def panels(self) -> list[Panel]:
        """Return the other panels; one that no run has records for is left out."""
        one = self._runs[0] if len(self._runs) == 1 else None
        found = [self._bits()] if any(run.of("evaluation") for run in self._runs) else []
        if any(run.of("tasks") for run in self._runs):
            found += [self._tasks("per cent right"), self._tasks("margin of the right answer, nats")]
        found += [
            self._measured(event, field, title, unit)
            for title, (event, field, unit) in OF_TUNING.items()
            if any(field in record for run in self._runs for record in run.of(event))
        ]
        found += [
            self._lines("learning rate", {"lr": "matrices", "adam_lr": "AdamW"}),
            self._gradients(),
            self._lines("tokens/s", {"tokens_per_second": ""}, low=0),
            self._lines("model TFLOP/s", {"tflops": ""}, low=0),
            self._lines("memory, GB", {"memory": ""}, low=0, unit=1e9),
            self._lines("waiting for data, % of the time", {"data_wait": ""}, low=0, unit=0.01),
        ]
        if one is not None and any("rank_seconds" in step for step in one.steps):
            found.append(self._ranks(one))
        if any("loads" in step for run in self._runs for step in run.steps):
            found.append(self._lines("variation of the experts' load, σ / mean", {"experts_cv": ""}, low=0))
            if one is not None:
                found.append(self._heat_map(one))
        return found

    def _loss(self, unit: str, axis: Callable[[Run], np.ndarray]) -> Panel:
        def draw(ax: Axes) -> None:
            late = []
            for color, run in enumerate(self._runs):
                loss, x = run.column("loss"), axis(run)
                mean = _smooth(loss)
                late.append(mean[int((1 - LATE) * len(mean)) :])
                places, _, low, high = _thinned(x, loss)
                ax.fill_between(places, low, high, color=f"C{color}", **RAW)
                ax.plot(places, _thinned(x, mean)[1], color=f"C{color}", label=run.name)
                self._marks(ax, run, x)
            shown = np.concatenate(late)
            room = max(0.15 * np.ptp(shown), 0.02)
            ax.set(xlabel=self._say(unit), ylim=(shown.min() - room, shown.max() + room))
            self._name_runs(ax)

        return Panel(self._say("loss, nats per token"), draw)

    def _marks(self, ax: Axes, run: Run, x: np.ndarray) -> None:
        """Mark starts and turns by lines, checkpoints and skipped steps at the edge; x is the axis at the steps."""
        if len(self._runs) > 1:
            return
        steps = run.column("step")
        places = {  # where the axis is at a step
            event: np.interp([r["step"] for r in run.of(event) if r["step"]], steps, x)
            for event in ("start", *TURNS, "checkpoint", "bad_step")
        }
        for event in ("start", *TURNS):
            for place in places[event]:
                ax.axvline(place, color="gray" if event == "start" else "tab:orange", linewidth=1, linestyle=":")
        for event, mark, name in (("checkpoint", "|", "checkpoint"), ("bad_step", "x", "skipped step")):
            if len(places[event]):
                edge = np.full(len(places[event]), 0.02)
                ax.plot(
                    places[event], edge, mark, color="gray", transform=ax.get_xaxis_transform(), label=self._say(name)
                )

    def _bits(self) -> Panel:
        def draw(ax: Axes) -> None:
            for number, run in enumerate(self._runs):
                evaluations = run.of("evaluation")
                for color, domain in enumerate(evaluations[-1]["bpb"] if evaluations else ()):
                    bits = [r["bpb"].get(domain, np.nan) for r in evaluations]
                    name = domain if len(self._runs) == 1 else f"{run.name}, {domain}"
                    style: dict[str, Any] = {"color": f"C{color}", "linestyle": ("-", "--", ":", "-.")[number % 4]}
                    ax.plot(run.column("tokens", evaluations) / 1e6, bits, marker=".", label=name, **style)
            ax.set(xlabel=self._say("million tokens"))
            _legend(ax)

        return Panel(self._say("bits per byte of held-out text"), draw)

    def _tasks(self, what: str) -> Panel:
        """Draw each task's curve: per cent right, or nats between the right answer and the mean of the others."""

        def draw(ax: Axes) -> None:
            for run in self._runs:
                records = run.of("tasks")
                for task in records[-1]["scores"] if records else ():
                    scores = [r["scores"][task] for r in records]
                    percent = what == "per cent right"
                    values = [100 * s["metrics"]["acc"]["value"] if percent else s["margin"] for s in scores]
                    name = task if len(self._runs) == 1 else f"{run.name}, {task}"
                    ax.plot(run.column("tokens", records) / 1e6, values, marker=".", label=name)
            ax.set(xlabel=self._say("million tokens"))
            _legend(ax)

        return Panel(self._say(what), draw)

    def _measured(self, event: str, field: str, title: str, unit: float) -> Panel:
        """Draw a field of an evaluation's records."""

        def draw(ax: Axes) -> None:
            for run in self._runs:
                records = run.of(event)
                values = [record.get(field, np.nan) / unit for record in records]
                ax.plot(run.column("step", records), values, marker=".", label=run.name)
            ax.set(xlabel=self._say("step"))
            ax.set_ylim(bottom=0)
            self._name_runs(ax)

        return Panel(self._say(title), draw)

    def _lines(self, title: str, names: dict[str, str], low: float | None = None, unit: float = 1) -> Panel:
        """Draw fields of the steps, each with its label; several runs by colour, several fields by dashes."""

        def draw(ax: Axes) -> None:
            for color, run in enumerate(self._runs):
                for dashes, (field, label) in zip(("-", "--"), names.items(), strict=False):
                    records = [r for r in run.steps if field in r]
                    x, mean, *_ = _thinned(run.column("step", records), run.column(field, records) / unit)
                    said = self._say(label) if label else ""
                    name = ", ".join(part for part in (run.name if len(self._runs) > 1 else "", said) if part)
                    ax.plot(x, mean, color=f"C{color}", linestyle=dashes, label=name)
            ax.set(xlabel=self._say("step"))
            if low is not None:
                ax.set_ylim(bottom=low)
            _legend(ax)

        return Panel(self._say(title), draw)

    def _gradients(self) -> Panel:
        def draw(ax: Axes) -> None:
            ax.set_yscale("log")
            for color, run in enumerate(self._runs):
                x, mean, low, high = _thinned(run.column("step"), run.column("gnorm"))
                ax.fill_between(x, low, high, color=f"C{color}", **RAW)
                ax.plot(x, mean, color=f"C{color}", label=run.name)
                spikes: Records = [r for r in run.steps if r.get("spike")]
                for mark, records, name in (("v", spikes, "loss spike"), ("x", run.of("bad_step"), "skipped step")):
                    if records and len(self._runs) == 1:
                        place = run.column("step", records), np.full(len(records), high.max())
                        ax.plot(*place, mark, color="tab:red", label=self._say(name))
            ax.set(xlabel=self._say("step"))
            self._name_runs(ax)

        return Panel(self._say("gradient norm"), draw)

    def _ranks(self, run: Run) -> Panel:
        """Draw the time of each process's micro-batches; a start may have had fewer processes than another."""
        records: Records = [r for r in run.steps if "rank_seconds" in r]
        steps, count = run.column("step", records), max(len(r["rank_seconds"]) for r in records)

        def draw(ax: Axes) -> None:
            for rank in range(count):
                mine = np.array([len(r["rank_seconds"]) > rank for r in records])
                seconds = [r["rank_seconds"][rank] for r, there in zip(records, mine, strict=True) if there]
                x, mean, *_ = _thinned(steps[mine], 1e3 * np.array(seconds))
                ax.plot(x, mean, label=f"{rank}" if count <= LEGEND else "")
            ax.set(xlabel=self._say("step"))
            ax.set_ylim(bottom=0)
            _legend(ax)

        return Panel(self._say("micro-batches of a step by rank, ms"), draw)

    def _heat_map(self, run: Run) -> Panel:
        record: dict[str, Any] = next(r for r in reversed(run.steps) if "loads" in r)
        loads = np.array(record["loads"], float)

        def draw(ax: Axes) -> None:
            fair = loads / loads.mean(1, keepdims=True)
            image = ax.imshow(fair, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="none")
            ax.grid(False)
            ax.figure.colorbar(image, ax=ax)
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set(xlabel=self._say("expert"), ylabel=self._say("MoE layer"))

        title = self._say("experts' load, 1 = fair")
        return Panel(f"{title} ({self._say('step')} {record['step']:,})", draw)

    def _name_runs(self, ax: Axes) -> None:
        """Name the runs where there are several, else what is marked."""
        handles, labels = ax.get_legend_handles_labels()
        alone = self._runs[0].name if len(self._runs) == 1 else None
        shown = [(h, label) for h, label in zip(handles, labels, strict=True) if label != alone]
        if shown:
            ax.legend(*zip(*shown, strict=True))


def _legend(ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    shown = [(h, label) for h, label in zip(handles, labels, strict=True) if label]
    if shown:
        columns = 1 + (len(shown) > 6)
        ax.legend(*zip(*shown, strict=True), ncols=columns)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return at most POINTS points of a curve: places, means, and the least and the largest values of each."""
    parts = np.array_split(np.arange(len(x)), min(len(x), POINTS))
    mean = np.array([y[part].mean() for part in parts])
    low, high = (np.array([edge(y[part]) for part in parts]) for edge in (np.min, np.max))
    return np.array([x[part[-1]] for part in parts]), mean, low, high


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the trailing mean over a fiftieth of the curve."""
    width = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate(([0.0], values)))
    starts = np.maximum(0, np.arange(1, len(values) + 1) - width)
    ends = np.arange(1, len(values) + 1)
    return (sums[ends] - sums[starts]) / (ends - starts)
