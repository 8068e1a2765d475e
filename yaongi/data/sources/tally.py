"""What became of the rows of a source, file by file."""

from collections import Counter
from collections.abc import Iterable, Iterator


class Tally:
    """Counts of one source's rows: documents and their UTF-8 bytes for each file, as of its last reading."""

    def __init__(self) -> None:
        self.files: dict[str, Counter[str]] = {}

    def counted(self, file: str, texts: Iterable[str]) -> Iterator[str]:
        """Yield the texts of a file, and count them."""
        counts = self.files[file] = Counter(documents=0, bytes=0)
        for text in texts:
            counts["documents"] += 1
            counts["bytes"] += len(text.encode("utf-8", "surrogatepass"))
            yield text
