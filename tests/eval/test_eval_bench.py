"""The benchmark's work: KMMLU's shape, the same prompts with and without lm-eval, full rows."""

from pathlib import Path

import bench_eval
import pytest
import torch

from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.choices import encode_items
from yaongi.eval.encoding import CachedEncoder
from yaongi.eval.scoring import Request, Scorer
from yaongi.model import Yaongi


def test_questions_have_the_shape_of_kmmlu(tokenizer: Tokenizer) -> None:
    rows = bench_eval.questions(90)
    assert rows == bench_eval.questions(90)
    assert len({row["question"] for row in rows}) == 90
    items = bench_eval.items_of(rows)
    assert len({item.task for item in items}) == bench_eval.SUBJECTS
    for item in items:
        assert item.context.count("정답：") == 1 + bench_eval.SHOTS
        assert item.choices == (" A", " B", " C", " D")
    requests = encode_items(items[:4], CachedEncoder(tokenizer))
    assert tokenizer.decode([*requests[1].context, *requests[1].continuation]) == f"{items[0].context} B"


def test_lm_eval_makes_the_same_prompts(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e .[eval]")
    from yaongi.eval.harness.task_data import load_tasks, task_manager
    from yaongi.eval.harness.task_items import task_items

    names = bench_eval.write_subjects(tmp_path, 6, subjects=2)
    assert names == ["subject_0", "subject_1"]
    manager = task_manager(names, include=tmp_path)
    found = [item for name in names for item in task_items(load_tasks(manager, name), bench_eval.SHOTS)]
    wanted = bench_eval.items_of(bench_eval.questions(6), subjects=2)
    assert [sorted(item.context.split("\n\n")) for item in found] == [
        sorted(item.context.split("\n\n")) for item in wanted
    ]  # lm-eval draws the order of the examples
    assert [(item.task, item.choices, item.answer) for item in found] == [
        (item.task, item.choices, item.answer) for item in wanted
    ]


def test_a_plain_forward_pass_reads_the_scorer_s_rows(plain_folder: Path) -> None:
    """Those of full passes alone, with their padding."""
    scorer = Scorer(Yaongi.from_pretrained(plain_folder), rows_per_pass=2)
    requests = [Request([length, *range(1, length - 1)], [3]) for length in (200, 150, 140, 90, 250)]
    scorer.score(requests)
    forward, tokens = bench_eval.forward_of(scorer, requests)
    forward()
    passes = scorer.tally.positions // (2 * scorer.tally.row_tokens)
    assert passes > 0
    assert tokens == passes * 2 * scorer.tally.row_tokens


def test_scores_of_both_adapters_agree(plain_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the benchmark's rows; not if one letter's score is another's, nor if a single prompt is cut elsewhere."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e .[eval]")
    from lm_eval.models.huggingface import HFLM

    from yaongi.eval.lm_eval_adapter import YaongiLM

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    instances = bench_eval.instances_of(bench_eval.items_of(bench_eval.questions(6), subjects=2, shots=0))
    wanted = HFLM(pretrained=str(plain_folder), device="cpu", dtype="float32", batch_size=4).loglikelihood(instances)
    found = YaongiLM.load(plain_folder).loglikelihood(instances)
    assert bench_eval.differences(found, wanted)["largest difference"] < 1e-4
    with pytest.raises(AssertionError, match=r"differs? by"):
        bench_eval.differences([*found[1:], found[0]], wanted)
    spread = float(torch.tensor([value for value, _ in wanted]).std())
    with pytest.raises(AssertionError, match=r"a log-likelihood differs by 2.5"):
        bench_eval.differences([(found[0][0] + 2.5 * spread, False), *found[1:]], wanted)
