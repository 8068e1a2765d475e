"""A source: the documents of one domain, split and origin."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from yaongi.data.sources.tally import Tally

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class Source:
    """Documents of one domain and origin; if `split` is None, `is_held_out` divides them into both splits."""

    domain: str
    split: str | None
    name: str
    licence: str
    documents: Callable[[], Iterator[str]]  # none of them blank
    fingerprint: Callable[[], str]  # changes if a document changes
    tally: Tally = field(default_factory=Tally)  # of the files, if there are any


class Sources(list[Source]):
    """Sources in order; `left_out` names each file beside theirs that is not read, with the reason."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out: list[tuple[str, str]] = []


def is_held_out(text: str, fraction: float) -> bool:
    """Return whether a document belongs to the held-out split, a fixed choice by the hash of its text."""
    key = hashlib.blake2b(text.strip().encode(), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(key, "big") < fraction * 2.0**64
