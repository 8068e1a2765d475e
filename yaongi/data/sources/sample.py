"""A sample of the sources at the shares of the mix, for the tokenizer: every source gives text, from all its files."""

from collections.abc import Iterator, Mapping, Sequence

from yaongi.data.mix import check_mix, in_order, planned_shares
from yaongi.data.sources.source import Part, Source

_FILES_AT_ONCE = 64
_READINGS = 2  # of every source; more would repeat what is known


class Sample:
    """About `total_bytes` of the documents of sources; each iteration gives the same ones.

    Within a domain, sources of the public mix have their shares in it, others go by size. A source that runs out starts
    again, until all have been read twice.
    """

    def __init__(self, sources: Sequence[Source], mix: Mapping[str, float], total_bytes: int) -> None:
        """Set the shares.

        Raises:
            ValueError: a domain of the mix has no source.
        """
        self._total = total_bytes
        self._shares: list[tuple[Source, float]] = []
        domains = in_order(source.domain for source in sources)
        for domain, share in check_mix(mix).items():
            found = [source for source in sources if source.domain == domain]
            if not found:
                raise ValueError(f"mix: domains must be among {', '.join(domains)}, which have text, got {domain}")
            sizes = planned_shares([source.share for source in found]) or [source.bytes for source in found]
            self._shares += [(s, share * size / sum(sizes)) for s, size in zip(found, sizes, strict=True)]
        self.given = [0] * len(self._shares)  # bytes of each source in the newest iteration

    def __iter__(self) -> Iterator[str]:
        """Yield the documents. Raises ValueError if a source has none or too many bad rows."""
        sources = [_Repeated(source) for source, _ in self._shares]
        scale = sum(share for _, share in self._shares)
        shares = [share / scale for _, share in self._shares]
        self.given = given = [0] * len(sources)
        while (done := sum(given)) < self._total and any(source.readings < _READINGS for source in sources):
            chosen = max(range(len(shares)), key=lambda i: shares[i] * done - given[i])
            yield self._next(sources, chosen)
        for number in range(len(sources)):
            if not given[number]:
                yield self._next(sources, number)

    def _next(self, sources: "Sequence[_Repeated]", number: int) -> str:
        text = next(sources[number])
        self.given[number] += _size(text)
        return text

    def lines(self) -> str:
        """Return how much each source gave, as lines to print."""
        rows = zip(self._shares, self.given, strict=True)
        return "\n".join(f"  {source.domain}/{source.name}: {size / 1e6:.2f} MB" for (source, _), size in rows)


class _Repeated:
    """The documents of a source without end."""

    def __init__(self, source: Source) -> None:
        self._source, self._documents = source, _from_all_files(source)
        self.readings = 0  # how often every document has been given
        first = next(self._documents, None)
        if first is None:
            raise ValueError(f"mix: source {source.name} of {source.domain} must have text, got none")
        self._ahead = first  # so that a reading ends with its last document

    def __next__(self) -> str:
        text, following = self._ahead, next(self._documents, None)
        if following is None:
            self.readings, self._documents = self.readings + 1, _from_all_files(self._source)
            following = next(self._documents)
        self._ahead = following
        return text


def _from_all_files(source: Source) -> Iterator[str]:
    """Yield all documents of a source, up to 64 files at a time, spread over its files."""
    step = -(-len(source.parts) // _FILES_AT_ONCE)
    for start in range(step):
        yield from _in_turn(source.parts[start::step])
    source.tally.finish()


def _in_turn(parts: Sequence[Part]) -> Iterator[str]:
    """Yield the documents of several files, so that all come to their end together."""
    left = {number: (part.bytes, part.documents()) for number, part in enumerate(parts)}
    given = dict.fromkeys(left, 0)
    while left:
        chosen = min(left, key=lambda number: given[number] / left[number][0])
        text = next(left[chosen][1], None)
        if text is None:
            del left[chosen]
            continue
        given[chosen] += _size(text)
        yield text


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
