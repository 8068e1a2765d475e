"""The corpus inside the package: a few megabytes, without a download, always the same for one Python version.

Korean comes from a grammar and from prose written for this project, mathematics from a generator, English and code from
the installed standard library. It is for the quick start and for tests; real runs need real text.
"""

import hashlib
from collections.abc import Callable, Iterator

from yaongi.data.sources.embedded.arithmetic import math_documents
from yaongi.data.sources.embedded.korean import korean_documents, prose
from yaongi.data.sources.embedded.stdlib import code_documents, english_documents
from yaongi.data.sources.source import TRAIN, VAL, Part, Source, is_held_out

SEED = 20250101
HELD_OUT = 0.04
KOREAN_DOCUMENTS = 4_500
MATH_DOCUMENTS = 1_600
OURS = "Apache-2.0 (written for Open-Yaongi)"
PYTHONS = "PSF-2.0 (the installed Python)"

# The value of `shipped_hash`: SHA-256 of the shipped and generated text. Text from the standard library is left out
# because it differs by Python version.
SHIPPED_SHA256 = "a5b00bc2d402fc4c1f86a33fde6dc93d1b62a8749edc5d8e6e4a3cb63fc8c666"


def korean() -> Iterator[str]:
    """Yield the prose, then the grammar's documents."""
    yield from prose()
    yield from korean_documents(SEED, KOREAN_DOCUMENTS)


def mathematics() -> Iterator[str]:
    """Yield the generator's problems."""
    yield from math_documents(SEED, MATH_DOCUMENTS)


def shipped_hash() -> str:
    """Return the SHA-256 of the Korean and mathematics documents, with a NUL after each."""
    total = hashlib.sha256()
    for documents in (korean(), mathematics()):
        for text in documents:
            total.update(text.encode() + b"\0")
    return total.hexdigest()


_DOMAINS: dict[str, tuple[str, str, Callable[[], Iterator[str]]]] = {
    "ko": ("embedded-korean", OURS, korean),
    "en": ("embedded-english", PYTHONS, english_documents),
    "code": ("embedded-code", PYTHONS, code_documents),
    "math": ("embedded-math", OURS, mathematics),
}

_TEXT_BYTES = {"ko": 2_500_000, "en": 1_200_000, "code": 2_000_000, "math": 1_200_000}  # about


def embedded_sources() -> list[Source]:
    """Return the sources of the four domains, in both splits."""
    return [_source(domain, split) for domain in _DOMAINS for split in (TRAIN, VAL)]


def _source(domain: str, split: str) -> Source:
    name, licence, all_documents = _DOMAINS[domain]

    def documents() -> Iterator[str]:
        return (text for text in all_documents() if is_held_out(text, HELD_OUT) == (split == VAL))

    def fingerprint() -> str:
        return hashlib.sha256("\0".join(documents()).encode()).hexdigest()

    return Source(domain, split, name, licence, [Part(_TEXT_BYTES[domain], documents)], fingerprint)
