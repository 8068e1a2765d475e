"""A source: the documents of one domain, split and origin."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from yaongi.data.sources.tally import Tally

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class Part:
    """A file of a source; a source without files has one part."""

    bytes: int  # about as many of text
    documents: Callable[[], Iterator[str]]  # none of them blank


@dataclass(frozen=True)
class Source:
    """Documents of one domain and origin; if `split` is None, `is_held_out` divides them into both splits."""

    domain: str
    split: str | None
    name: str
    licence: str
    parts: Sequence[Part]
    fingerprint: Callable[[], str]  # changes if a document changes
    share: float | None = None  # percent of the public mix, for a source of it
    tally: Tally = field(default_factory=Tally)  # of the files, if there are any

    @property
    def bytes(self) -> int:
        """About how many bytes of text it has."""
        return sum(part.bytes for part in self.parts)

    def documents(self) -> Iterator[str]:
        """Yield the documents of all parts. Raises ValueError if too many rows were bad."""
        for part in self.parts:
            yield from part.documents()
        self.tally.finish()


class Sources(list[Source]):
    """Sources in order; `left_out` names each file beside theirs that is not read, with the reason."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out: list[tuple[str, str]] = []


def is_held_out(text: str, fraction: float) -> bool:
    """Return whether a document belongs to the held-out split, a fixed choice by the hash of its text."""
    key = hashlib.blake2b(text.strip().encode(), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(key, "big") < fraction * 2.0**64
