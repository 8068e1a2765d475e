"""Train the tokenizer on sources, unless it is up to date."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from yaongi.data.mix import choose_mix, in_order, mix_text
from yaongi.data.sources.readers import PLAIN, Reading
from yaongi.data.sources.sample import Sample
from yaongi.data.sources.source import VAL
from yaongi.data.sources.specs import open_sources
from yaongi.data.tokenizer import MODEL_FILE, Tokenizer, train_tokenizer
from yaongi.files import read_json, sha256_file, write_json

RECORD = "training.json"


def train_on_sources(
    specs: Sequence[str],
    out: Path,
    vocab_size: int,
    mix: str,
    total_bytes: int,
    *,
    reading: Reading = PLAIN,
    say: Callable[[str], None] = print,
) -> Tokenizer:
    """Train on about `total_bytes` of `specs` (see `sources.specs`), at the shares of `mix`, and save into `out`.

    Do nothing if `out` already holds the tokenizer of the same text and settings.

    Args:
        vocab_size: number of pieces; fewer if the text is too little for them.
        mix: shares of the domains, such as `ko=40,law=20`; if empty, those that `mix.choose_mix` gives.

    Raises:
        ValueError, FileNotFoundError: as in `open_sources`, `choose_mix`, `Sample` and `train_tokenizer`.
    """
    sources = [source for source in open_sources(specs, reading, say) if source.split != VAL]
    sizes = {
        domain: sum(s.bytes for s in sources if s.domain == domain) for domain in in_order(s.domain for s in sources)
    }
    shares = choose_mix(mix, sizes)
    say(f"mix: {mix_text(shares)}")
    if unused := [domain for domain in sizes if domain not in shares]:
        say(f"not in the mix, so not read: {', '.join(unused)}")
    plan = {
        "inputs": [[s.domain, s.name, s.share, s.fingerprint()] for s in sources],
        "vocab_size": vocab_size,
        "mix": shares,
        "bytes": total_bytes,
        **asdict(reading),
    }
    if (done := _finished(out, plan)) is not None:
        say(f"tokenizer in {out} is up to date")
        return done
    began = time.monotonic()
    sample = Sample(sources, shares, total_bytes)
    tokenizer = train_tokenizer(sample, vocab_size, say)
    say(f"text for the tokenizer:\n{sample.lines()}")
    tokenizer.save(out)
    write_json(out / RECORD, {**plan, "hash": tokenizer.hash})
    say(
        f"tokenizer {tokenizer.hash[:12]} of {tokenizer.vocab_size:,} pieces in {out}, {time.monotonic() - began:.0f} s"
    )
    return tokenizer


def _finished(out: Path, plan: Mapping[str, object]) -> Tokenizer | None:
    record = out / RECORD
    if not record.is_file() or not (out / MODEL_FILE).is_file():
        return None
    wanted = {**plan, "hash": sha256_file(out / MODEL_FILE)}
    try:
        return Tokenizer.load(out) if read_json(record) == json.loads(json.dumps(wanted)) else None
    except ValueError:
        return None  # damaged: train again
