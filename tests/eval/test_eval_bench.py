"""The benchmark's work: KMMLU's shape, the same prompts with and without lm-eval, full rows."""

from pathlib import Path

import bench_eval
import pytest

from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.choices import encode_items
from yaongi.eval.encoding import CachedEncoder


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
