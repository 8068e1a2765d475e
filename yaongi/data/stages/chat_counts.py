"""What became of the conversations that were read: how many were kept, and what was lost for which reason."""

from collections import Counter

from yaongi.data.chats.fitting import TOO_LONG, Loss
from yaongi.data.chats.rows import CHAT
from yaongi.data.sources.source import TRAIN, VAL

_MUCH = 0.05  # share of the targets; if more are lost by length, that is said
_COLUMNS = ("conversations", "turns", "targets")


class ChatCounts:
    """Conversations (or pairs of them), their turns, and their targets: the ids that are learnt."""

    def __init__(self, kind: str) -> None:
        """Start at zero."""
        self.what = "conversations" if kind == CHAT else "pairs"
        self._kept = {split: Counter[str]() for split in (TRAIN, VAL)}
        self._lost: dict[str, Counter[str]] = {}

    def keep(self, split: str, turns: int, targets: int) -> None:
        """Count a conversation that is written."""
        self._kept[split].update(dict(zip(_COLUMNS, (1, turns, targets), strict=True)))

    def lose(self, loss: Loss) -> None:
        """Count what is lost of a conversation."""
        reason, *counts = loss
        self._lost.setdefault(reason, Counter()).update(dict(zip(_COLUMNS, counts, strict=True)))

    def table(self) -> dict[str, dict[str, int]]:
        """Return the counts: read, lost for each reason, kept in each split. What was read is the sum of the others."""
        parts = {f"lost, {reason}": self._lost[reason] for reason in sorted(self._lost)}
        parts |= {f"kept, {split}": count for split, count in self._kept.items()}
        rows = {"read": sum(parts.values(), Counter()), **parts}
        return {name: {column: row[column] for column in _COLUMNS} for name, row in rows.items()}

    def lines(self) -> list[str]:
        """Return the table as text, and a warning for what went wrong."""
        table = self.table()
        wide = max(map(len, table))
        titles = (self.what, *_COLUMNS[1:])
        lines = [" " * wide + "".join(f"{title:>15}" for title in titles)]
        lines += [f"{name:<{wide}}" + "".join(f"{n:>15,}" for n in row.values()) for name, row in table.items()]
        share = self._lost.get(TOO_LONG, Counter())["targets"] / max(1, table["read"]["targets"])
        if share > _MUCH:
            lines.append(f"warning: {share:.1%} of the targets are lost because they are too long: more --row-tokens?")
        if not self._kept[VAL]:
            lines.append(f"warning: no {self.what} are held out, so nothing will be measured on them: a larger --val?")
        return lines

    def summary(self) -> str:
        """Return in a few words why none is left to learn from."""
        counts = {reason: count["conversations"] for reason, count in sorted(self._lost.items())}
        counts["held out"] = self._kept[VAL]["conversations"]
        return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
