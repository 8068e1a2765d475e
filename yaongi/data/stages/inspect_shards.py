"""Check a folder of token shards and show its contents."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from yaongi.data.epochs import WORTHWHILE, check_epochs, count_epochs, epoch_warnings, tokens_for
from yaongi.data.mix import Mixture, choose_mix, mix_text
from yaongi.data.shards import ShardSet
from yaongi.data.streams import TokenStream, training_streams
from yaongi.data.tokenizer import Tokenizer

_SHOWN_CHARACTERS = 300


def inspect_shards(
    folder: Path,
    samples: int = 1,
    console: Console | None = None,
    *,
    mix: str = "",
    tokens: float = 0,
    allow_epochs: bool = False,
) -> None:
    """Check every file; print counts per domain, dropped documents, epochs, and the first held-out documents.

    Args:
        mix: shares of the domains; if empty, those that `mix.choose_mix` gives.
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


def _show_documents(shard_set: ShardSet, tokenizer: Tokenizer, domain: str, samples: int, console: Console) -> None:
    shards = shard_set.shards("val", domain)
    ends = shard_set.index(shards[0])[:samples, 0].astype(int).tolist()
    stream = TokenStream(shard_set, shards)
    for start, end in zip([0, *ends], ends, strict=False):
        text = tokenizer.decode(stream.read(start, end - start).tolist())
        console.rule(f"{domain}, {end - start} tokens")
        console.print(text[:_SHOWN_CHARACTERS] + ("…" if len(text) > _SHOWN_CHARACTERS else ""), markup=False)
