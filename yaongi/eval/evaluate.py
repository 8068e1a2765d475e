"""`python -m yaongi.eval tasks`: a model on a list of tasks, from its folder to `results.json`, table and page."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from yaongi import cli
from yaongi.data.chats.template import CHAT_TEMPLATE
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.answering import Answerer
from yaongi.eval.basics.instructions import run_instructions
from yaongi.eval.basics.suite import GROUP, QUESTIONS, TASKS, basics_items
from yaongi.eval.basics.suite import VERSION as BASICS_VERSION
from yaongi.eval.choices import encode_items, measure, score_items
from yaongi.eval.encoding import CachedEncoder
from yaongi.eval.harness.suites import BASICS, INSTRUCTIONS, OWN, Ask
from yaongi.eval.progress import Done
from yaongi.eval.report.results import add_results, check_same_model, describe_model, write_samples
from yaongi.eval.scoring import Scorer
from yaongi.model import Yaongi
from yaongi.model.hub.checkpoint_folders import find_weights, said_weights, tokenizer_folder
from yaongi.model.hub.folder import read_config
from yaongi.world import World

Say = Callable[[str], None]
PROGRESS = "progress"  # folder of what was done before an interruption
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Settings:
    """How tasks are run."""

    out: Path
    limit: int | None = None
    chat: bool = False
    prefix: Literal["none", "bos"] = "none"
    dtype: str = "auto"
    row_tokens: int = 0
    rows_per_pass: int = 0
    max_new_tokens: int | None = None
    include: Path | None = None
    data_root: Path | None = None
    allow_code: bool = False
    trained_tokens: int | None = None


@dataclass
class Loaded:
    """A model folder in memory, with what scores and answers."""

    folder: Path
    scorer: Scorer
    answerer: Answerer
    description: dict[str, Any]

    @property
    def dtype(self) -> str:
        """The name of the weights' dtype."""
        return str(self.scorer.model.lm_head.weight.dtype).removeprefix("torch.")


def load(folder: Path, settings: Settings, world: World, say: Say) -> Loaded:
    """Load a model folder, a run's newest checkpoint or any one, and what was done with it before an interruption.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder is not that of such a model, or `out` holds results of another one.
    """
    given, folder = folder, find_weights(folder)
    read_config(folder)
    tokenizer = Tokenizer.of_model(tokenizer_folder(folder))
    dtype = DTYPES.get(settings.dtype, torch.float32 if world.device.type == "cpu" else torch.bfloat16)
    model = Yaongi.from_pretrained(folder, dtype=dtype, device=world.device).eval()
    description = describe_model(folder, model, tokenizer, settings.trained_tokens)
    check_same_model(settings.out, description)
    if given != folder:
        say(said_weights(given, folder).rstrip())
    name = f"{description['weights'][:16]}-{str(dtype).removeprefix('torch.')}-{world.device.type}"
    done = Done(settings.out / PROGRESS, name, world)
    if len(done):
        say(f"going on: {len(done):,} batches are in {settings.out / PROGRESS}")
    scorer = Scorer(model, world, settings.row_tokens, settings.rows_per_pass, done, say)
    return Loaded(folder, scorer, Answerer(model, tokenizer, world, done=done, say=say), description)


def evaluate(folder: Path, asked: Sequence[Ask], settings: Settings, world: World, say: Say) -> dict[str, Any] | None:
    """Run the tasks and write `results.json` and `samples/`; return all results of `out`, in the first process.

    Raises:
        ValueError, OSError: a folder, a data set or an option doesn't fit; the message is one line.
    """
    others = [ask for ask in asked if ask not in OWN]
    manager = None
    if others:
        cli.require("lm_eval")
        from yaongi.eval.harness.task_data import task_manager

        if settings.allow_code:
            say("--allow-code: what the model writes is run on this machine, without a sandbox")
        names = [ask.task for ask in others]
        options: dict[str, Any] = {name: getattr(settings, name) for name in ("include", "data_root", "allow_code")}
        manager = task_manager(names, **options)
    loaded = load(folder, settings, world, say)
    began = time.perf_counter()
    tasks: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    if BASICS in asked:
        tasks, samples = run_basics(loaded.scorer, loaded.answerer.tokenizer, settings.limit)
    if INSTRUCTIONS in asked:
        found = run_instructions(loaded.answerer, settings.limit, settings.max_new_tokens)
        tasks, samples = tasks | found[0], samples | found[1]
    lm = None
    if manager is not None:
        from yaongi.eval.harness.run_tasks import run_tasks
        from yaongi.eval.lm_eval_adapter import YaongiLM

        lm = YaongiLM(loaded.scorer, loaded.answerer, prefix=settings.prefix, max_new_tokens=settings.max_new_tokens)
        theirs = run_tasks(
            lm, others, manager, limit=settings.limit, chat=settings.chat, allow_code=settings.allow_code
        )
        tasks, samples = tasks | theirs.tasks, samples | theirs.samples
    run = _describe_run(loaded, settings, time.perf_counter() - began, lm)
    if not world.is_main:
        return None
    write_samples(settings.out, samples)
    return add_results(settings.out, loaded.description, run, tasks)


def run_basics(scorer: Scorer, tokenizer: Tokenizer, limit: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return results and samples of our own suite."""
    items = basics_items(QUESTIONS if limit is None else min(limit, QUESTIONS))
    outcomes = score_items(scorer, items, encode_items(items, CachedEncoder(tokenizer)))
    tasks: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    for task, (what, _) in TASKS.items():
        mine = [(item, outcome) for item, outcome in zip(items, outcomes, strict=True) if item.task == task]
        measured = measure([outcome for _, outcome in mine])
        tasks[task] = measured | {
            "group": GROUP,
            "shots": 0,
            "limit": limit,
            "version": str(BASICS_VERSION),
            "about": what,
        }
        samples[task] = [
            {
                "id": number,
                "prompt": item.context,
                "choices": item.choices,
                "target": item.answer,
                "log_likelihoods": outcome.log_likelihoods,
                "acc": float(outcome.right),
            }
            for number, (item, outcome) in enumerate(mine)
        ]
    whole = measure(outcomes)
    return {GROUP: whole | {"group": None, "shots": 0, "limit": limit, "tasks": list(TASKS)}} | tasks, samples


def _describe_run(loaded: Loaded, settings: Settings, seconds: float, lm: Any) -> dict[str, Any]:
    """Return what `results.json` holds of a command."""
    scorer, tally, answers = loaded.scorer, loaded.scorer.tally, loaded.answerer.tally
    device = scorer.world.device
    versions = {"torch": str(torch.__version__)}
    if lm is not None:
        versions |= {name: metadata.version(name) for name in ("lm_eval", "datasets")}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "dtype": loaded.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": scorer.world.size,
        "prefix": settings.prefix,
        "chat": hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest() if settings.chat else None,
        "limit": settings.limit,
        "max_length": scorer.max_length,
        "max_new_tokens": settings.max_new_tokens,
        "rows_per_pass": scorer.rows_at_once,
        "row_tokens": tally.row_tokens,
        "prompts_at_once": loaded.answerer.at_once,
        "requests": tally.requests,
        "cut": tally.cut + answers.cut,
        "cut_tokens": tally.cut_tokens + answers.cut_tokens,
        "mismatches": lm.mismatches if lm is not None else 0,
        "tokens": tally.tokens,
        "positions": tally.positions,
        "fill": tally.fill,
        "tokens_per_second": tally.tokens / tally.seconds if tally.seconds else 0.0,
        "answers": answers.prompts,
        "answer_tokens": answers.tokens,
        "answer_seconds": answers.seconds,
        "seconds": seconds,
    }
