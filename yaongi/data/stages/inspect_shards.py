"""Check a folder of token shards and show its contents."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from yaongi.data.epochs import WORTHWHILE, check_epochs, count_epochs, epoch_warnings, tokens_for
from yaongi.data.mix import Mixture, choose_mix, mix_text
from yaongi.data.shards import ShardSet
from yaongi.data.streams import TokenStream, training_streams
from yaongi.data.tokenizer import Tokenizer

_SHOWN_CHARACTERS = 300
_LONG = (1 << 12, 1 << 14, 1 << 15)  # tokens of long documents
_FEW = 10  # per cent of the tokens that should be in documents as long as a row


def inspect_shards(
    folder: Path,
    samples: int = 1,
    console: Console | None = None,
    *,
    mix: str = "",
    tokens: float = 0,
    allow_epochs: bool = False,
    row_tokens: int = 0,
) -> None:
    """Check every file; print counts per domain, dropped documents, epochs, and the first held-out documents.

    Args:
        mix: shares of the domains; if empty, those that `mix.choose_mix` gives.
        row_tokens: of a run with long rows, to warn of domains without documents of that length; 0: of none.
        tokens: of a run, to print how often it reads each source; 0: as many as read none more than four times.

    Raises:
        ValueError, FileNotFoundError: as in `ShardSet.open` and `choose_mix`, or a source is read too often.
    """
    console = console or Console()
    shard_set = ShardSet.open(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    manifest = shard_set.manifest
    table = Table("split", "domain", "documents", "tokens", "MB", "bytes/token", "shards")
    origins = set()
    for split, domains in manifest["splits"].items():
        for domain, part in domains.items():
            origins |= {f"{domain}: {shard['source']}, licence {shard['licence']}" for shard in part["shards"]}
            counts = f"{part['documents']:,}", f"{part['tokens']:,}", f"{part['bytes'] / 1e6:.1f}"
            table.add_row(split, domain, *counts, f"{part['bytes'] / part['tokens']:.2f}", str(len(part["shards"])))
    console.print(table)
    for origin in sorted(origins):
        console.print(origin, markup=False)
    for label, counts in manifest["counts"].items():
        dropped = {key: count for key, count in counts.items() if key not in ("documents", "tokens")}
        console.print(f"{label}: dropped " + ", ".join(f"{count:,} {key}" for key, count in dropped.items()))
    console.print(f"tokenizer {tokenizer.hash[:12]} ({tokenizer.vocab_size:,} pieces), manifest {shard_set.hash[:12]}")
    for domain in manifest["splits"].get("val", {}):
        _show_documents(shard_set, tokenizer, domain, samples, console)
    for domain in manifest["splits"].get("train", {}):
        _show_lengths(shard_set, domain, row_tokens, console)
    _show_epochs(shard_set, mix, tokens, allow_epochs, console)


def _show_epochs(shard_set: ShardSet, mix: str, tokens: float, allowed: bool, console: Console) -> None:
    shares = choose_mix(mix, shard_set.tokens("train"))
    streams = training_streams(shard_set, shares)
    there = {stream.name: stream.tokens for stream in streams}
    parts = Mixture({stream.name: stream.share for stream in streams}).shares
    wanted = tokens or tokens_for(there, parts, WORTHWHILE)
    console.print(f"a run on {wanted:,.0f} tokens at the mix {mix_text(shares)}:", markup=False)
    epochs = count_epochs(there, parts, wanted)
    for line in [*map(str, epochs), *(f"warning: {line}" for line in epoch_warnings(epochs))]:
        console.print(line, markup=False, soft_wrap=True)
    check_epochs(epochs, allowed)


def _show_lengths(shard_set: ShardSet, domain: str, row_tokens: int, console: Console) -> None:
    """Print which part of a domain's tokens is in long documents, and warn if rows would have hardly any."""
    ends = [shard_set.index(shard)[:, 0].astype(np.int64) for shard in shard_set.shards("train", domain)]
    lengths = np.concatenate([np.diff(part, prepend=0) for part in ends])

    def share(least: int) -> float:
        return 100 * float(lengths[lengths >= least].sum() / lengths.sum())

    parts = ", ".join(f"{share(least):.0f}% of {least >> 10}k and more" for least in _LONG)
    console.print(f"{domain}: tokens in documents {parts}", markup=False)
    if row_tokens and share(row_tokens) < _FEW:
        said = f"{share(row_tokens):.0f}% of the tokens of {domain} are in documents of {row_tokens:,} tokens and more"
        console.print(f"warning: {said}: rows of that length hardly teach a long context", markup=False, soft_wrap=True)


def _show_documents(shard_set: ShardSet, tokenizer: Tokenizer, domain: str, samples: int, console: Console) -> None:
    shards = shard_set.shards("val", domain)
    ends = shard_set.index(shards[0])[:samples, 0].astype(int).tolist()
    stream = TokenStream(shard_set, shards)
    for start, end in zip([0, *ends], ends, strict=False):
        text = tokenizer.decode(stream.read(start, end - start).tolist())
        console.rule(f"{domain}, {end - start} tokens")
        console.print(text[:_SHOWN_CHARACTERS] + ("…" if len(text) > _SHOWN_CHARACTERS else ""), markup=False)
