"""The part of a model card that tells of the run: what the model was trained on, and what it scores."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from yaongi.files import read_json_lines
from yaongi.model.hub.card import CARD
from yaongi.model.hub.checkpoint_folders import METRICS

HEADING = "## Training"


def add_run(folder: Path, run: Path, step: int | None = None) -> None:
    """Add the part to the card in `folder`, in the place of an earlier one; without a record of the run do nothing.

    Args:
        run: folder of the run.
        step: what was recorded up to this step; None: all.
    """
    if not (run / METRICS).is_file():
        return
    card = (folder / CARD).read_text(encoding="utf-8").partition(f"\n{HEADING}\n")[0]
    records = [r for r in read_json_lines(run / METRICS) if step is None or r["step"] <= step]
    (folder / CARD).write_text(f"{card.rstrip()}\n\n{HEADING}\n\n{_described(records)}", encoding="utf-8")


def _described(records: list[dict[str, Any]]) -> str:
    newest = {record["event"]: record for record in records}
    plan, last = newest.get("plan", {}), newest.get("step", {})
    tokens = last.get("tokens", 0)
    parts = []
    if plan:
        parts.append(
            f"Trained with Open-Yaongi, preset `{plan['preset']}`: {tokens:,} tokens in {last.get('step', 0):,} steps."
        )
    sources = newest.get("start", {}).get("sources", [])
    if sources and plan.get("tokens"):
        done = tokens / plan["tokens"]
        shares = ((s["name"], s["wanted"] * done, s["wanted"] * done / max(1, s["there"])) for s in sources)
        parts.append(_table(("text", "tokens", "epochs"), ((name, f"{n:,.0f}", f"{e:.2f}") for name, n, e in shares)))
    if bits := newest.get("evaluation", {}).get("bpb"):
        parts.append(_table(("held-out text", "bits per byte"), ((domain, f"{b:.3f}") for domain, b in bits.items())))
    if scores := newest.get("tasks", {}).get("scores"):
        correct = ((name, f"{100 * found['metrics']['acc']['value']:.1f}") for name, found in scores.items())
        parts.append(_table(("task", "accuracy in %"), correct))
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))
