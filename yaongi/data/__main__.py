"""`python -m yaongi.data download|benchmarks|tokenizer|tokenize|chat|inspect`: the stages from sources to shards."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import tyro

from yaongi import cli
from yaongi.data.chats.encode import TrainOn
from yaongi.data.chats.fitting import TooLong
from yaongi.data.sources.readers import PLAIN, Reading
from yaongi.data.sources.tally import BAD_ROWS

Words = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]  # `--name a b` and `--name a --name b`
BadRows = Annotated[
    float, tyro.conf.arg(help="share of a source's rows that may be bad and are skipped; one in any case.")
]
SOURCES = "embedded, DOMAIN=PATH, a folder with train/ and val/, or a file or folder; none: embedded."
Sources = Annotated[Words, tyro.conf.arg(name="source", help=SOURCES)]
HUB = "hf:OWNER/NAME, hf:OWNER/NAME:SUBSET or DOMAIN=hf:..., the train split of each; none: the public mix."
HubSources = Annotated[Words, tyro.conf.arg(name="source", help=HUB)]
CHATS = (
    "a file, a folder (with train/ and val/: both splits), hf:OWNER/NAME, hf:OWNER/NAME:SUBSET, …:SUBSET:SPLIT, "
    "embedded:instructions or embedded:preferences."
)
ChatSources = Annotated[Words, tyro.conf.arg(name="source", help=CHATS)]
Read = Annotated[Reading, tyro.conf.arg(name="")]
MIX = "shares of the domains, such as ko=40,law=20; none: of those with text the public mix's, or their sizes."
Mix = Annotated[str, tyro.conf.arg(help=MIX)]


def joined(words: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """Return the words of an option that may be repeated."""
    return tuple(chain.from_iterable(words))


@dataclass(frozen=True)
class Download:
    """Download the public data sets of the 15 B-token mix, or others of the hub. Resumes where it was interrupted."""

    source: HubSources = ()
    text_field: str = ""  # with --source: field of the rows that holds the text; none: text
    out: Path = Path("data/raw")  # folder to write; it is a --source for the other stages
    tokens: float = 15e9  # tokens to download in all; each data set gets its share
    only: Words = ()  # names of the data sets to download; none: all
    mirror: Path | None = None  # read a local copy, MIRROR/owner/name/..., instead of the hub; None: the hub
    bad_rows: BadRows = BAD_ROWS

    def run(self) -> None:
        from yaongi.data.sources.hub import named_sources
        from yaongi.data.stages.download import Places, download, public_mix

        named, names = joined(self.source), joined(self.only)
        sources = named_sources(named, self.text_field) if named else public_mix(names)
        download(self.out, self.tokens, Places.of(self.mirror), sources, bad_rows=self.bad_rows)


@dataclass(frozen=True)
class TrainTokenizer:
    """Train the tokenizer on a mix of the sources. Does nothing when the result is up to date."""

    source: Sources = ()
    out: Path = Path("data/tokenizer")  # folder to write
    vocab_size: int = 32768  # size of the vocabulary
    mix: Mix = ""
    megabytes: float = 60.0  # megabytes of text to train on
    reading: Read = PLAIN

    def run(self) -> None:
        from yaongi.data.stages.train_tokenizer import train_on_sources

        size = int(self.megabytes * 1e6)
        specs = joined(self.source) or ("embedded",)
        train_on_sources(specs, self.out, self.vocab_size, self.mix, size, reading=self.reading)


@dataclass(frozen=True)
class Tokenize:
    """Write the sources as token shards: text in NFC, without duplicates and benchmark texts.

    Does nothing when the result is up to date.
    """

    source: Sources = ()
    tokenizer: Path = Path("data/tokenizer")  # folder of the tokenizer
    out: Path = Path("data/tokens")  # folder to write
    held_out: float = 0.005  # share of the documents to hold out where a domain has no val/ of its own
    near_duplicates: bool = True  # drop near duplicates too (MinHash), not only exact ones
    index_gb: float = 8.0  # most memory for what was seen; where it is full, what was seen longest ago is forgotten
    benchmark: Words = ()  # files or folders of benchmarks: training documents that quote them are left out
    shard_tokens: int = 100_000_000  # tokens per shard
    reading: Read = PLAIN
    workers: int = 0  # worker processes; 0: one per core

    def run(self) -> None:
        from yaongi.data.stages.tokenize_sources import Options, tokenize_sources
        from yaongi.data.tokenizer import Tokenizer

        if self.index_gb < 0.02:
            raise ValueError(f"tokenize: --index-gb must be at least 0.02, got {self.index_gb:g}")
        options = Options(
            self.held_out,
            self.near_duplicates,
            int(self.index_gb * 1e9),
            joined(self.benchmark),
            self.shard_tokens,
            self.reading,
        )
        specs = joined(self.source) or ("embedded",)
        tokenize_sources(specs, Tokenizer.load(self.tokenizer), self.out, options, workers=self.workers)


@dataclass(frozen=True)
class Chat:
    """Write conversations, or pairs of answers, for python -m yaongi.tune: ids, and a mask of what is learnt.

    Reads OpenAI's and TRL's messages, ShareGPT, Alpaca, prompt and completion, and preferences, in JSON, Parquet and
    tables. Prints what was lost, and why. Does nothing when the result is up to date.
    """

    source: ChatSources = ()
    tokenizer: Path = Path("data/tokenizer")  # folder of the tokenizer: that of the model to tune
    out: Path = Path("data/chat")  # folder to write
    row_tokens: int = 4096  # tokens of a row, and of the longest conversation
    show: int = 0  # conversations to print, with what is learnt in colour
    train_on: TrainOn = "answers"  # what is learnt: every answer, the last answer of a conversation, or all of it
    too_long: TooLong = "turns"  # what goes of a conversation that is too long: whole turns from its end; or an error
    val: float = 0.01  # share of the questions to hold out, where a source has no val/ of its own
    benchmark: Words = ()  # files or folders of benchmarks: training conversations that quote them are left out
    encoding: str = "utf-8"  # encoding of text files and JSON lines, such as cp949
    mirror: Path | None = None  # read a local copy, MIRROR/owner/name/..., instead of the hub; None: the hub
    shard_tokens: int = 100_000_000  # tokens per shard
    workers: int = 0  # worker processes; 0: one per core

    def run(self) -> None:
        from yaongi.data.shards import ShardSet
        from yaongi.data.sources.row_sources import open_row_sources
        from yaongi.data.stages.show_chats import show_chats
        from yaongi.data.stages.tokenize_chats import ChatOptions, tokenize_chats
        from yaongi.data.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(self.tokenizer)
        options = ChatOptions(
            self.row_tokens, self.train_on, self.too_long, self.val, joined(self.benchmark), self.shard_tokens
        )
        sources = open_row_sources(joined(self.source), encoding=self.encoding, mirror=self.mirror)
        manifest = tokenize_chats(sources, tokenizer, self.out, options, workers=self.workers)
        if self.show:
            show_chats(ShardSet.open(self.out, kind=manifest["kind"]), tokenizer, self.show)


@dataclass(frozen=True)
class FetchBenchmarks:
    """Fetch the benchmarks whose texts must not be trained on: KMMLU, HAE-RAE, KoBEST, HRM8K, GSM8K and others."""

    out: Path = Path("data/benchmarks")  # folder to write, for tokenize --benchmark
    mirror: Path | None = None  # read a local copy, MIRROR/owner/name/..., instead of the hub; None: the hub

    def run(self) -> None:
        from yaongi.data.stages.download import Places
        from yaongi.data.stages.fetch_benchmarks import fetch_benchmarks

        fetch_benchmarks(self.out, Places.of(self.mirror))


@dataclass(frozen=True)
class Inspect:
    """Check the files of a folder of token shards, and show its contents."""

    folder: tyro.conf.Positional[Path] = Path("data/tokens")  # folder of the token shards
    samples: int = 1  # held-out documents to show per domain
    mix: Mix = ""
    tokens: float = 0  # of a run, to show how often it reads each source; 0: as many as read none more than 4 times
    allow_epochs: bool = False  # no error where a source is read more than 16 times
    row_tokens: int = 0  # of a run with long rows, to warn of domains without documents of that length

    def run(self) -> None:
        from yaongi.data.stages.inspect_shards import inspect_shards

        options = {name: getattr(self, name) for name in ("mix", "tokens", "allow_epochs", "row_tokens")}
        inspect_shards(self.folder, self.samples, **options)


def main() -> None:
    """Run one stage; an error is one line on standard error, and exit code 1."""
    stages: dict[str, Callable[..., Any]] = {
        "download": Download,
        "benchmarks": FetchBenchmarks,
        "tokenizer": TrainTokenizer,
        "tokenize": Tokenize,
        "chat": Chat,
        "inspect": Inspect,
    }
    stage = tyro.extras.subcommand_cli_from_dict(
        stages,
        prog="python -m yaongi.data",
        description="From sources to token shards, one stage each.",
        args=cli.with_digits(sys.argv[1:], ("--tokens", "--shard-tokens", "--row-tokens")),
    )
    cli.run(stage.run, interrupted="interrupted; run the same command to go on")


if __name__ == "__main__":
    main()
