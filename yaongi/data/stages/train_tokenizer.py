"""Train the tokenizer on sources, unless it is up to date."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from yaongi.data.mix import mixed_documents
from yaongi.data.sources.source import VAL, Source
from yaongi.data.sources.specs import open_sources
from yaongi.data.sources.tally import BAD_ROWS
from yaongi.data.tokenizer import MODEL_FILE, Tokenizer, train_tokenizer
from yaongi.files import sha256_file, write_atomically

RECORD = "training.json"


def train_on_sources(
    specs: Sequence[str],
    out: Path,
    vocab_size: int,
    mix: Mapping[str, float],
    total_bytes: int,
    *,
    bad_rows: float = BAD_ROWS,
    say: Callable[[str], None] = print,
) -> Tokenizer:
    """Train on about `total_bytes` of `specs` (see `sources.specs`), at the ratios of `mix`, and save into `out`.

    Do nothing if `out` already holds the tokenizer of the same text and settings.

    Raises:
        ValueError, FileNotFoundError: as in `open_sources`, `mixed_documents` and `train_tokenizer`.
    """
    sources = [source for source in open_sources(specs, bad_rows, say) if source.split != VAL]
    inputs = [[s.domain, s.name, s.fingerprint()] for s in sources]
    plan = {"inputs": inputs, "vocab_size": vocab_size, "mix": dict(mix), "bytes": total_bytes, "bad_rows": bad_rows}
    if (done := _finished(out, plan)) is not None:
        say(f"tokenizer in {out} is up to date")
        return done
    began = time.monotonic()
    by_domain = {domain: [s for s in sources if s.domain == domain] for domain in {s.domain for s in sources}}
    documents = {domain: _reader(found) for domain, found in by_domain.items()}
    tokenizer = train_tokenizer(mixed_documents(documents, mix, total_bytes), vocab_size)
    tokenizer.save(out)
    write_atomically(out / RECORD, json.dumps({**plan, "hash": tokenizer.hash}, indent=1).encode())
    say(
        f"tokenizer {tokenizer.hash[:12]} of {tokenizer.vocab_size:,} pieces in {out}, {time.monotonic() - began:.0f} s"
    )
    return tokenizer


def _reader(sources: Sequence[Source]) -> Callable[[], Iterator[str]]:
    return lambda: chain.from_iterable(source.documents() for source in sources)


def _finished(out: Path, plan: Mapping[str, object]) -> Tokenizer | None:
    record = out / RECORD
    if not record.is_file() or not (out / MODEL_FILE).is_file():
        return None
    wanted = {**plan, "hash": sha256_file(out / MODEL_FILE)}
    return Tokenizer.load(out) if json.loads(record.read_text()) == json.loads(json.dumps(wanted)) else None
