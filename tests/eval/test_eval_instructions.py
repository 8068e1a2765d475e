"""The suite `instructions`: every behaviour is asked as in training, and only the right answer counts."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from yaongi.data.chats.encode import encode_prompt, encode_rendered
from yaongi.data.sources.embedded.instructions import BEHAVIOURS, instruction_rows
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.answering import Prompt
from yaongi.eval.basics.instructions import Question, questions, run_instructions
from yaongi.eval.evaluate import Settings, evaluate
from yaongi.eval.harness.suites import INSTRUCTIONS
from yaongi.eval.report.page import write_page
from yaongi.eval.report.results import read_results
from yaongi.eval.scoring import ALONE

QUESTIONS = questions()


def test_every_behaviour_is_asked_often(tokenizer: Tokenizer) -> None:
    counts = Counter(question.behaviour for question in QUESTIONS)
    assert set(counts) == set(BEHAVIOURS)
    assert min(counts.values()) >= 150
    assert questions(7) == [q for b in BEHAVIOURS for q in [q for q in QUESTIONS if q.behaviour == b][:7]]


def test_prompts_are_those_of_training(tokenizer: Tokenizer) -> None:
    """Of a conversation of several exchanges, those before are in the prompt with their right answers."""
    asked = {tuple(encode_rendered(question.prompt, tokenizer.encode)): question for question in QUESTIONS}
    found = 0
    for row in list(instruction_rows("val"))[:30]:
        for number, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                prompt = tuple(encode_prompt(row["messages"][:number], tokenizer))
                assert asked[prompt].answer == message["content"]
                found += 1
    assert found > 40


class Answering:
    """Answers as a model would that is right unless `wrong` says otherwise."""

    def __init__(self, wrong: dict[Question, str]) -> None:
        self.wrong = wrong
        self.lengths: set[int] = set()

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        self.lengths = {prompt.max_new_tokens for prompt in prompts}
        by_prompt = {question.prompt: question for question in QUESTIONS}
        return [self.wrong.get(by_prompt[p.text], f" {by_prompt[p.text].answer}\n") for p in prompts]


def test_the_share_of_right_answers_is_measured() -> None:
    copies = [question for question in questions(20) if question.behaviour == "copy"]
    answering = Answering({copies[0]: copies[0].answer + " 그리고", copies[3]: ""})
    tasks, samples = run_instructions(answering, 20, 64)  # type: ignore[arg-type]
    assert answering.lengths == {64}
    assert tasks["instructions"]["n"] == 160
    assert tasks["instructions"]["metrics"]["exact_match"]["value"] == pytest.approx(158 / 160)
    assert tasks["instructions_copy"]["metrics"]["exact_match"]["value"] == pytest.approx(18 / 20)
    assert tasks["instructions_last_word"]["metrics"]["exact_match"]["value"] == 1
    assert [s["exact_match"] for s in samples["instructions_copy"]] == [0, 1, 1, 0] + [1] * 16
    assert samples["instructions_copy"][3]["answer"] == ""


def test_a_model_is_asked(folder: Path, tmp_path: Path) -> None:
    """As the command does: results, samples and a page, without a download."""
    evaluate(folder, [INSTRUCTIONS], Settings(tmp_path, limit=1, max_new_tokens=8), ALONE, print)
    found = read_results(tmp_path)["tasks"]
    assert found["instructions"]["n"] == 8
    assert found["instructions"]["tasks"] == [name for name in found if name != "instructions"]
    (line,) = (tmp_path / "samples" / "instructions_sum.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"].endswith("<|im_start|>assistant\n")
    page = write_page([tmp_path], tmp_path / "report.html").read_text()
    assert "What “instructions” asks" in page
