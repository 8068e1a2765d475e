"""What became of the rows of a source: counts file by file, and a limit to those that are bad."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from yaongi.data.text import cut

BAD_ROWS = 1e-4
_EARLY = 1_000_000  # before a source's end its rows count as at least so many: bad rows may lie close together
_SHOWN = 5


class BadRows:
    """The rows that can't be used: the first of them are said, and more than a share of all rows is an error."""

    def __init__(self, share: float, say: Callable[[str], None]) -> None:
        """Allow `share` of the rows to be bad, and one in any case."""
        self.share, self._say = share, say
        self._said: list[str] = []
        self._last = "in an earlier run"

    def skip(self, error: ValueError, bad: int, rows: int) -> None:
        """Skip the row that `error` names, the last of `bad` among `rows` so far. Raises ValueError as `check` does."""
        self._last = str(error).removeprefix("data: ")
        if len(self._said) < _SHOWN and self._last not in self._said:
            self._said.append(self._last)
            self._say(f"bad row skipped: {self._last}")
        if bad > self._allowed(max(rows, _EARLY)):
            self.check(bad, rows)

    def check(self, bad: int, rows: int) -> None:
        """Raise ValueError if `bad` among all `rows` of a source are too many."""
        if bad > self._allowed(rows):
            wanted = f"at most {self._allowed(rows):,} among {rows:,} (--bad-rows {self.share:g})"
            raise ValueError(f"data: bad rows must be {wanted}, got {bad:,}; the last: {self._last}")

    def _allowed(self, rows: int) -> int:
        return max(1, int(self.share * rows))


class Tally:
    """Counts of one source's rows: for each file, as of its last reading, documents, UTF-8 bytes, `empty` and `bad`."""

    def __init__(
        self, bad_rows: float = BAD_ROWS, say: Callable[[str], None] = print, longest: int | None = None
    ) -> None:
        """Start with no rows.

        Args:
            bad_rows: share of the rows that may be bad.
            longest: bytes of the longest document; longer texts are cut, and counted as `cut`. None: no limit.
        """
        self.files: dict[str, Counter[str]] = {}
        self._longest = longest
        self._bad_rows = BadRows(bad_rows, say)

    def counted(self, file: str, texts: Iterable[str | ValueError]) -> Iterator[str]:
        """Yield the texts of a file's rows, and count them; leave out what is empty, and rows that are an error.

        Raises:
            ValueError: there are too many bad rows.
        """
        counts = self.files[file] = Counter(documents=0, bytes=0)
        for text in texts:
            if isinstance(text, ValueError):
                counts["bad"] += 1
                self._bad_rows.skip(text, self.total("bad"), self._rows())
            elif not text or text.isspace():
                counts["empty"] += 1
            else:
                for part in self._parts(text, counts):
                    counts["documents"] += 1
                    counts["bytes"] += len(part.encode())
                    yield part

    def _parts(self, text: str, counts: Counter[str]) -> list[str]:
        if self._longest is None or 4 * len(text) <= self._longest:
            return [text]
        parts = cut(text, self._longest)
        if len(parts) > 1:
            counts["cut"] += 1
        return parts

    def total(self, key: str) -> int:
        """Return the sum of a count over all files."""
        return sum(counts[key] for counts in self.files.values())

    def finish(self) -> None:
        """Raise ValueError if too many of all rows were bad."""
        self._bad_rows.check(self.total("bad"), self._rows())

    def _rows(self) -> int:
        return sum(self.total(key) for key in ("documents", "empty", "bad"))
