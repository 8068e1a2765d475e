"""`python -m yaongi.data download|tokenizer|tokenize|inspect`: from sources to token shards, one stage each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from yaongi import cli
from yaongi.data.mix import DEFAULT_MIX_TEXT, parse_mix

Sources = Annotated[
    tuple[str, ...],
    tyro.conf.arg(name="source", help="embedded, DOMAIN=PATH (ko, en, code, math), or a folder with train/ and val/."),
]


@dataclass(frozen=True)
class Download:
    """Bring the public data sets of the 15 B-token mix to disk. Goes on where it was interrupted."""

    out: Path = Path("data/raw")  # folder to write, a source for the other stages
    tokens: float = 15e9  # budget for the whole mix
    only: tuple[str, ...] = ()  # names of sources; all if none
    mirror: Path | None = None  # read MIRROR/owner/name/... instead of the hub

    def run(self) -> None:
        from yaongi.data.stages.download import Places, download

        download(self.out, self.tokens, Places.of(self.mirror), names=self.only)


@dataclass(frozen=True)
class TrainTokenizer:
    """Train the tokenizer on the sources, mixed at their ratios."""

    source: Sources = ("embedded",)
    out: Path = Path("data/tokenizer")  # folder to write
    vocab_size: int = 32768  # pieces in all
    mix: str = DEFAULT_MIX_TEXT  # shares per domain, by bytes
    megabytes: float = 60.0  # text to train on

    def run(self) -> None:
        from yaongi.data.stages.train_tokenizer import train_on_sources

        train_on_sources(self.source, self.out, self.vocab_size, parse_mix(self.mix), int(self.megabytes * 1e6))


@dataclass(frozen=True)
class Tokenize:
    """Write token shards of the sources: NFC, without duplicates and benchmark texts. Does nothing when up to date."""

    source: Sources = ("embedded",)
    tokenizer: Path = Path("data/tokenizer")  # folder of the tokenizer
    out: Path = Path("data/tokens")  # folder to write
    held_out: float = 0.005  # share of documents to hold out where a domain has no val/
    near_duplicates: bool = True  # drop near duplicates too (MinHash), not only exact ones
    benchmark: tuple[str, ...] = ()  # kmmlu, haerae, logickor, gsm8k (hub), or files: drop documents that quote them
    shard_tokens: int = 100_000_000  # tokens per shard
    workers: int = 0  # processes; 0: one per core

    def run(self) -> None:
        from yaongi.data.stages.tokenize_sources import Options, tokenize_sources
        from yaongi.data.tokenizer import Tokenizer

        options = Options(self.held_out, self.near_duplicates, self.benchmark, self.shard_tokens)
        tokenize_sources(self.source, Tokenizer.load(self.tokenizer), self.out, options, workers=self.workers)


@dataclass(frozen=True)
class Inspect:
    """Check a folder of token shards, and show what is in it."""

    folder: Path = Path("data/tokens")  # folder of token shards
    samples: int = 1  # documents to show from each domain

    def run(self) -> None:
        from yaongi.data.stages.inspect_shards import inspect_shards

        inspect_shards(self.folder, self.samples)


def main() -> None:
    """Parse the command line and run one stage; what goes wrong is one line on stderr, exit code 1."""
    stage = tyro.extras.subcommand_cli_from_dict(
        {"download": Download, "tokenizer": TrainTokenizer, "tokenize": Tokenize, "inspect": Inspect},
        prog="python -m yaongi.data",
        description="From sources to token shards, one stage each.",
    )
    cli.run(stage.run, interrupted="interrupted; run the same command to go on")


if __name__ == "__main__":
    main()
