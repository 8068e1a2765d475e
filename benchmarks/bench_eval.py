"""Scoring prompts with `yaongi-4b` in bfloat16: beside a plain forward pass, training, and lm-eval's `hf` adapter.

The work has KMMLU's shape: 45 subjects, five examples before each question, four letters; its questions are made of the
project's own sentences. The times of `Scorer.score` hold all that is done per request: passes found and shared, packed,
run, and their results fetched.
"""

import gc
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_train_step import MICRO_ROWS, figures, seconds, trainer_step
from measure import report

from yaongi.data.packing import pack
from yaongi.data.sources.embedded.korean import korean_documents
from yaongi.data.tokenizer import Tokenizer, train_tokenizer
from yaongi.eval.choices import Item, encode_items
from yaongi.eval.encoding import CachedEncoder
from yaongi.eval.rows.batches import make_batches, to_device
from yaongi.eval.scoring import Request, Scorer
from yaongi.model import Yaongi, load_preset
from yaongi.model.hub.folder import export_nemotron_h
from yaongi.train.config import load_config
from yaongi.world import World

PRESET = "yaongi-4b"
QUESTIONS, SUBJECTS, SHOTS = 35_030, 45, 5
SOME, FEW = 4_000, 64  # questions for the comparison with a forward pass, and with the `hf` adapter
LETTERS = ("A", "B", "C", "D")
ROUNDS = 3
MEAN_APART, MOST_APART = 0.5, 2.0  # of the log-likelihoods' standard deviation, between two adapters in bfloat16


def questions(count: int) -> list[dict[str, Any]]:
    """Return questions of about KMMLU's length, with four answers, as rows of a data set."""
    sentences = [
        s.strip()
        for text in korean_documents(7, count // 4 + 64)
        for s in text.replace("\n", " ").split(".")
        if len(s) > 12
    ]
    rng = random.Random(0)
    found = []
    for number in range(count):
        lines = rng.sample(sentences, 3 + 4)
        text = f"{number}번. {'. '.join(lines[:3])}. 다음 가운데 이 글에 이어질 말은?"
        options = dict(zip(LETTERS, (line[:24] for line in lines[3:]), strict=True))
        found.append({"question": text, "answer": rng.randrange(4), **options})
    return found


def shown(row: dict[str, Any]) -> str:
    """Return a question as KMMLU's task shows it."""
    options = "\n".join(f"{letter}. {row[letter]}" for letter in LETTERS)
    return f"{row['question']}\n{options}\n정답："


def items_of(rows: list[dict[str, Any]], subjects: int = SUBJECTS, shots: int = SHOTS) -> list[Item]:
    """Return the questions with their subject's examples before them; the examples come from further rows."""
    examples = questions(subjects * shots)
    items = []
    for number, row in enumerate(rows):
        subject = number * subjects // len(rows)
        before = [f"{shown(e)} {LETTERS[e['answer']]}" for e in examples[subject * shots :][:shots]]
        context = "\n\n".join([*before, shown(row)])
        items.append(Item(f"subject_{subject}", context, tuple(f" {letter}" for letter in LETTERS), row["answer"]))
    return items


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Give a tokenizer of Korean sentences."""
    return train_tokenizer(list(korean_documents(0, 4000)), 8192, say=lambda _: None)


@pytest.fixture
def model() -> Iterator[Yaongi]:
    """Give the model, with initial weights."""
    yield Yaongi(load_preset(PRESET), device="cuda", dtype=torch.bfloat16).eval()
    gc.collect()
    torch.cuda.empty_cache()


def scorer_of(model: Yaongi) -> Scorer:
    """Return a scorer that has chosen its rows per pass and compiled its kernels."""
    scorer = Scorer(model, World(0, 1, next(model.parameters()).device))
    scorer.score([Request(list(range(900)), [1])] * 2)
    scorer.tally = type(scorer.tally)()
    return scorer


def fastest(call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Return the seconds of the fastest call, host and GPU together."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def forward_of(scorer: Scorer, requests: list[Request]) -> tuple[Callable[[], None], int]:
    """Return a plain forward pass over the rows in which these were scored last, without documents, and its tokens."""
    passes = scorer._passes(requests)
    row_tokens, at_once = scorer.tally.row_tokens, scorer.rows_at_once
    batches = make_batches(passes, pack([len(p.tokens) for p in passes], row_tokens), row_tokens, at_once)
    full = [batch for batch in batches if len(batch.input_ids) == at_once] or batches
    sent = [to_device(batch.input_ids, scorer.world.device) for batch in full]

    @torch.no_grad()
    def forward() -> None:
        for ids in sent:
            scorer.model.hidden_states(ids)

    return forward, sum(ids.numel() for ids in sent)


def test_prompts(model: Yaongi, tokenizer: Tokenizer, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time SOME questions beside a plain forward pass over the same rows, in the same run."""
    requests = encode_items(items_of(questions(SOME)), CachedEncoder(tokenizer))
    scorer = scorer_of(model)
    took = fastest(lambda: scorer.score(requests))
    tokens, fill = scorer.tally.tokens / ROUNDS, scorer.tally.fill
    forward, forward_tokens = forward_of(scorer, requests)
    forward()
    forward_rate = forward_tokens / fastest(forward)
    report(
        benchmark,
        request,
        {
            "tokens_per_s": tokens / took,
            "forward_tokens_per_s": forward_rate,
            "of_forward": tokens / took / forward_rate,
            "fill": fill,
            "rows_per_pass": scorer.rows_at_once,
            "peak": f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB",
        },
    )


def test_training(benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time the trainer's step, the measure for `tokens_per_s` of `test_prompts`."""
    config = load_config(PRESET)
    rows = MICRO_ROWS[PRESET]
    model = Yaongi(config.model, device="cuda", dtype=torch.bfloat16)
    step = trainer_step(model, config.train, rows, torch.device("cuda"))
    report(benchmark, request, figures(seconds(step), rows * config.train.row_tokens, config.train, 0.0))
    del model, step
    gc.collect()
    torch.cuda.empty_cache()


def test_kmmlu_sized(model: Yaongi, tokenizer: Tokenizer, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time all of KMMLU's questions from their text on: tokens, passes, scores."""
    items = items_of(questions(QUESTIONS))
    scorer = scorer_of(model)
    start = time.perf_counter()
    requests = encode_items(items, CachedEncoder(tokenizer))
    encoded = time.perf_counter() - start
    scorer.score(requests)
    whole = time.perf_counter() - start
    tally = scorer.tally
    info = {"seconds": whole, "encoding_seconds": encoded, "tokens": tally.tokens, "fill": tally.fill}
    report(benchmark, request, info | {"tokens_per_s": tally.tokens / tally.seconds, "questions": len(items)})


def test_kmmlu_sized_by_lm_eval(
    model: Yaongi, tokenizer: Tokenizer, tmp_path: Path, benchmark: Any, request: pytest.FixtureRequest
) -> None:
    """Time the same through lm-eval: its prompts, our scores, its metrics."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e .[eval]")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from yaongi.eval.answering import Answerer
    from yaongi.eval.lm_eval_adapter import YaongiLM

    names = write_subjects(tmp_path, QUESTIONS)
    scorer = scorer_of(model)
    lm = YaongiLM(scorer, Answerer(model, tokenizer, scorer.world))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    start = time.perf_counter()
    results = simple_evaluate(model=lm, tasks=names, num_fewshot=SHOTS, task_manager=manager, bootstrap_iters=0)
    whole = time.perf_counter() - start
    assert results is not None
    assert sum(len(samples) for samples in results["samples"].values()) == QUESTIONS
    info = {"seconds": whole, "scoring_seconds": scorer.tally.seconds, "fill": scorer.tally.fill}
    report(benchmark, request, info | {"tokens": scorer.tally.tokens, "mismatches": lm.mismatches})


def instances_of(items: list[Item]) -> list[Any]:
    """Return each choice of each question as a request of lm-eval."""
    from lm_eval.api.instance import Instance

    pairs = [(item.context, choice) for item in items for choice in item.choices]
    return [Instance("loglikelihood", {}, pair, 0, ("subject", 0, 1)) for pair in pairs]


def differences(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]]) -> dict[str, float]:
    """Return how far two adapters' log-likelihoods differ, as shares of the standard deviation of `wanted`.

    In bfloat16 they round otherwise, and with initial weights many experts' scores are all but equal, so others are
    chosen: a small model of 52 layers is 0.16 from float32, 0.44 at most. Scores of another token or place differ by 1.

    Raises:
        AssertionError: they are not of the same model and prompts.
    """
    ours, theirs = (torch.tensor([value for value, _ in scores], dtype=torch.float64) for scores in (found, wanted))
    apart = (ours - theirs).abs() / theirs.std()
    mean, worst = float(apart.mean()), float(apart.max())
    assert mean <= MEAN_APART, f"log-likelihoods differ by {mean:.3f} of their spread"
    assert worst <= MOST_APART, f"a log-likelihood differs by {worst:.3f} of their spread"
    return {"mean difference": mean, "largest difference": worst}


def test_hf_adapter(tokenizer: Tokenizer, tmp_path: Path, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time FEW questions by lm-eval's `hf` adapter and by ours, on the model without the Engram that theirs can't hold.

    Their scores agree.
    """
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e .[eval]")
    from lm_eval.models.huggingface import HFLM

    from yaongi.eval.answering import Answerer
    from yaongi.eval.lm_eval_adapter import YaongiLM

    instances = instances_of(items_of(questions(FEW)))
    model = Yaongi(load_preset(PRESET).without_engram(), device="cuda", dtype=torch.bfloat16).eval()
    scorer = scorer_of(model)
    ours = YaongiLM(scorer, Answerer(model, tokenizer, scorer.world))
    found = ours.loglikelihood(instances)
    took = fastest(lambda: ours.loglikelihood(instances))
    export_nemotron_h(model, model.config, model.count_parameters(), tmp_path)
    tokenizer.save(tmp_path)
    theirs = HFLM(pretrained=str(tmp_path), device="cuda", dtype="bfloat16", batch_size=8)
    theirs.loglikelihood(instances[:32])
    wanted: list[tuple[float, bool]] = []
    their_time = fastest(lambda: wanted.extend(theirs.loglikelihood(instances)), 1)
    info = {"ms": 1e3 * took, "hf ms": 1e3 * their_time, "x hf": their_time / took, **differences(found, wanted)}
    report(benchmark, request, info | {"questions_per_s": FEW / took})


SUBJECT = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/{name}.test.jsonl, dev: {folder}/{name}.dev.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: dev
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{A}}}}\\nB. {{{{B}}}}\\nC. {{{{C}}}}\\nD. {{{{D}}}}\\n정답："
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_subjects(folder: Path, count: int, subjects: int = SUBJECTS) -> list[str]:
    """Write the questions as tasks of lm-eval, and return their names."""
    rows, examples = questions(count), questions(subjects * SHOTS)
    names = []
    for subject, group in itertools.groupby(enumerate(rows), lambda pair: pair[0] * subjects // count):
        name = f"subject_{subject}"
        for split, lines in (("test", [row for _, row in group]), ("dev", examples[subject * SHOTS :][:SHOTS])):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / f"{name}.{split}.jsonl").write_text(text, encoding="utf-8")
        (folder / f"{name}.yaml").write_text(SUBJECT.format(name=name, folder=folder), encoding="utf-8")
        names.append(name)
    return names
