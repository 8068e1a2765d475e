"""`python -m yaongi.eval tasks|fetch|report`: what a model can do, and where its scores are shown."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from yaongi import cli

Words = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]  # `--name a b` and `--name a --name b`
SUITE = (
    "basics (ours, no download), quick, korean (KMMLU, HAE-RAE, KoBEST), math or code, all of them with basics; "
    "instructions (ours, no download, for a model tuned on chats)."
)
Suite = Annotated[str, tyro.conf.arg(help=SUITE)]
TASKS = "tasks or groups of lm-eval instead of the suite, such as kmmlu,haerae; basics and instructions are ours."
TaskNames = Annotated[Words, tyro.conf.arg(help=TASKS)]


def names(words: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """Return the names of an option that may be repeated, each by itself or several by commas."""
    return tuple(name for word in chain.from_iterable(words) for name in word.split(",") if name)


@dataclass(frozen=True)
class Tasks:
    """Score a model on tasks. The same command goes on after an interruption. Works under torchrun too."""

    folder: tyro.conf.Positional[Path]  # model folder, run (its newest checkpoint) or checkpoint
    out: Path = Path("eval")  # folder to write: results.json, samples/, report.html
    suite: Suite = "basics"
    tasks: TaskNames = ()
    shots: int | None = None  # examples in each prompt; None: as the suite says, else as the task does
    limit: int | None = None  # only so many questions of each task, to try something; every table says so
    chat: bool = False  # put prompts in the chat format
    prefix: Literal["none", "bos"] = "none"  # what precedes a text without a context: nothing, or BOS as others do
    max_new_tokens: int | None = None  # cut answers to so many tokens, whatever the task says
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    row_tokens: int = 0  # tokens per packed row; 0: up to 4096, or the longest prompt's, so that rows are full
    rows_per_pass: int = 0  # rows run at once; 0: as many as fit into memory
    include: Path | None = None  # folder with further tasks, YAML files of lm-eval
    data_root: Path | None = None  # folder with local copies of the data sets, OWNER/NAME or NAME
    allow_code: bool = False  # let humaneval and mbpp run what the model writes, without a sandbox
    trained_tokens: int | None = None  # tokens that the model has seen, for curves; None: as its run's log says
    device: str = "auto"  # auto (a GPU where there is one), cpu, gpu or cuda

    def run(self) -> int:
        """Run the tasks, print the table, and write the page."""
        from yaongi.eval.evaluate import Settings, evaluate
        from yaongi.eval.harness.suites import asks
        from yaongi.eval.processes import in_world
        from yaongi.eval.report.page import write_page
        from yaongi.eval.report.table import print_table
        from yaongi.world import World

        if self.limit is not None and self.limit < 1:
            raise ValueError(f"eval: --limit must be 1 or more, got {self.limit}")
        asked = asks(self.suite, names(self.tasks), self.shots)
        shared = (field for field in Settings.__dataclass_fields__)
        settings = Settings(**{name: getattr(self, name) for name in shared})

        def score(world: World) -> None:
            results = evaluate(self.folder, asked, settings, world, print if world.is_main else _silent)
            if results is not None:
                print_table(results)
                print(f"report: {write_page([self.out], self.out / 'report.html')}")

        in_world(self.device, score)
        return 0


@dataclass(frozen=True)
class Fetch:
    """Load every data set of a suite once, so that it is there without a connection (HF_HUB_OFFLINE=1)."""

    suite: Suite = "korean"
    tasks: TaskNames = ()
    include: Path | None = None  # folder with further tasks, YAML files of lm-eval
    data_root: Path | None = None  # folder with local copies of the data sets, OWNER/NAME or NAME
    allow_code: bool = False  # also humaneval and mbpp, whose metric is loaded only where it may run code

    def run(self) -> int:
        """Print a line per data set: rows and revision, or why it can't be had; return 1 if one can't."""
        from yaongi.eval.harness.suites import OWN, asks

        cli.require("lm_eval")
        from yaongi.eval.harness.task_data import fetch, task_manager

        wanted = [ask.task for ask in asks(self.suite, names(self.tasks), None) if ask not in OWN]
        options: dict[str, Any] = {name: getattr(self, name) for name in ("include", "data_root", "allow_code")}
        failed = fetch(wanted, lambda found: task_manager(found, **options), print)
        return 1 if failed else 0


@dataclass(frozen=True)
class Report:
    """Put the results of one or several models side by side: a page with pictures, and the table."""

    folders: tyro.conf.Positional[tuple[Path, ...]]  # folders that `tasks` or `logickor` wrote
    out: Path = Path("report.html")  # page to write

    def run(self) -> None:
        """Print each table and the page's path."""
        from yaongi.eval.report.page import write_page
        from yaongi.eval.report.results import RESULTS, read_results
        from yaongi.eval.report.table import print_table

        page = write_page(list(self.folders), self.out)
        for folder in self.folders:
            if (folder / RESULTS).is_file():
                print(f"{folder}:")
                print_table(read_results(folder))
        print(f"report: {page}")


def _silent(_: str) -> None:
    """Say nothing, in all processes but the first."""
