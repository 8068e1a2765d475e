"""Scores from a judge's replies, and their means, failures apart."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yaongi.eval.logickor.judge import Reply
from yaongi.eval.logickor.protocol import TURNS

HIGHEST = 10.0
_SCORE = re.compile(r"점수:\s*(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Mark:
    """The score of one answer."""

    score: float | None  # None where it failed
    failure: str | None
    published: float  # what the protocol's own program would write: the first score there is, 0 for none


def mark(reply: Reply) -> Mark:
    """Return the score in a reply, asterisks left out. More than 10, or two different ones, is a failure."""
    if reply.text is None:
        return Mark(None, f"no reply: {reply.error}", 0.0)
    scores = [float(found) for found in _SCORE.findall(reply.text.replace("*", ""))]
    if not scores:
        return Mark(None, "no score in the reply", 0.0)
    if len(set(scores)) > 1:
        return Mark(None, f"several scores: {', '.join(f'{score:g}' for score in scores)}", scores[0])
    if scores[0] > HIGHEST:
        return Mark(None, f"score above {HIGHEST:g}: {scores[0]:g}", scores[0])
    return Mark(scores[0], None, scores[0])


def summarise(replies: Iterable[Reply], categories: Mapping[int, str]) -> dict[str, Any]:
    """Return `modes`, `categories` and `failures` of `logickor.json`.

    A mode's `single`, `multi` and `overall` (the mean of these two) leave failures out; `as_published` is the overall
    mean with what the protocol's own program would have written. Categories are those of the mode `default`, or the
    first one.
    """
    marks = [(reply, mark(reply)) for reply in replies]
    modes = {}
    for mode in dict.fromkeys(reply.mode for reply, _ in marks):
        mine = [(reply.turn, found) for reply, found in marks if reply.mode == mode]
        means = {turn: _mean([m.score for t, m in mine if t == turn]) for turn in TURNS}
        published = [_mean([m.published for t, m in mine if t == turn]) for turn in TURNS]
        failed = sum(m.score is None for _, m in mine)
        modes[mode] = {
            **means,
            "overall": _mean(list(means.values())) if None not in means.values() else None,
            "as_published": _mean(published),
            "answers": len(mine),
            "judged": len(mine) - failed,
            "failed": failed,
        }
    shown = "default" if "default" in modes else next(iter(modes), None)
    by_category: dict[str, dict[str, float | None]] = {}
    for name in dict.fromkeys(categories.values()):
        named = [(r.turn, m.score) for r, m in marks if r.mode == shown and categories.get(r.id) == name]
        by_category[name] = {turn: _mean([score for t, score in named if t == turn]) for turn in TURNS}
    failures = [
        {"mode": reply.mode, "id": reply.id, "turn": reply.turn, "why": found.failure}
        for reply, found in marks
        if found.failure is not None
    ]
    return {"modes": modes, "categories": by_category, "failures": failures}


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what there is."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
