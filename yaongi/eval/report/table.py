"""The table of an evaluation on a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

SIGNIFICANT = 2.0  # standard errors of guessing: a score that is nearer to chance is chance
MOST_MEMBERS = 12  # tasks of a group that the table lists
WIDE = 105  # columns of a terminal from which the whole table is shown
_PERCENT = ("acc", "exact_match", "f1", "pass")


def score_text(metric: Mapping[str, Any], name: str = "acc") -> str:
    """Return `25.3 ± 0.2`, in per cent where the metric is a share, and `(chance)` where guessing explains it."""
    scale = 100 if name.startswith(_PERCENT) else 1
    digits = 1 if scale == 100 else 3
    text = f"{scale * metric['value']:.{digits}f}"
    if metric["stderr"] is not None:
        text += f" ± {scale * metric['stderr']:.{digits}f}"
    return f"{text} (chance)" if is_chance(metric) else text


def is_chance(metric: Mapping[str, Any]) -> bool:
    """Return whether guessing explains a score."""
    return metric["chance"] is not None and abs(metric["distance"]) < SIGNIFICANT


def ordered(tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    """Yield each task with its depth: groups, then their members."""

    def below(name: str, depth: int) -> Iterator[tuple[int, str]]:
        yield depth, name
        for member, entry in tasks.items():
            if entry.get("group") == name and member != name:
                yield from below(member, depth + 1)

    for name, entry in tasks.items():
        if entry.get("group") not in tasks:
            yield from below(name, 0)


def print_table(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the results of a folder."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    table = Table(box=None, pad_edge=False)
    for column, justify in (("task", "left"), ("shots", "right"), ("n", "right"), ("metric", "left")):
        table.add_column(column, justify=justify, no_wrap=column != "metric")  # type: ignore[arg-type]
    columns = 5 if console.width >= WIDE else 2  # a narrow terminal shows score and chance
    for column in ("score", "chance", "distance", "bits/byte", "margin")[:columns]:
        table.add_column(column, justify="right", no_wrap=True)
    tasks = results["tasks"]
    for depth, name in ordered(tasks):
        entry = tasks[name]
        siblings = sum(other.get("group") == entry.get("group") for other in tasks.values())
        if depth == 0 or "tasks" in entry or siblings <= MOST_MEMBERS:
            for row in _rows(depth, name, entry):
                table.add_row(*row[: 4 + columns])
    console.print(table)
    hidden = sum(len(entry["tasks"]) for entry in tasks.values() if len(entry.get("tasks", ())) > MOST_MEMBERS)
    if hidden:
        console.print(f"{hidden} tasks of groups are in the page")
    for line in notes(results):
        console.print(line, markup=False)


def _rows(depth: int, name: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    first = True
    for metric, value in entry["metrics"].items():
        guess = "" if value["chance"] is None else f"{100 * value['chance']:.1f}"
        distance = "" if value["chance"] is None else f"{value['distance']:+.1f} σ"
        head = (f"{'  ' * depth}{name}", _shots(entry), f"{entry['n']:,}") if first else ("", "", "")
        more = [f"{entry[key]:.3f}" if first and key in entry else "" for key in ("bits_per_byte", "margin")]
        yield (*head, metric, score_text(value, metric), guess, distance, *more)
        first = False


def _shots(entry: Mapping[str, Any]) -> str:
    return "" if entry.get("shots") is None else str(entry["shots"])


def notes(results: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know beside the table: limits, cut prompts, merged boundaries, how fast it was."""
    found = []
    limits = {entry["limit"] for entry in results["tasks"].values() if entry.get("limit")}
    if limits:
        found.append(f"LIMITED to the first {', '.join(map(str, sorted(limits)))} questions of each task")
    for name, entry in results["tasks"].items():
        if entry.get("cut") and "tasks" not in entry:
            found.append(f"{name}: {entry['cut']:,} prompts were too long and lost their beginning")
        if entry.get("answers_shortened"):
            found.append(
                f"{name}: {entry['answers_shortened']:,} answers could be shorter than the task asks (--max-new-tokens)"
            )
    run = results["runs"][-1] if results["runs"] else {}
    if run.get("mismatches"):
        found.append(f"{run['mismatches']:,} contexts end in the middle of a token of context and continuation")
    if run.get("tokens"):
        found.append(
            f"{run['tokens']:,} tokens in {run['seconds']:.0f} s, {run['tokens_per_second']:,.0f} tokens/s, "
            f"rows {100 * run['fill']:.1f}% full, {run['rows_per_pass']} per pass, {run['dtype']} on {run['device']}"
        )
    return found
