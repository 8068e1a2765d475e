"""Our own suite: the same questions always, right answers that are right, and no way to guess them."""

import random
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from yaongi.data.sources.embedded.hangul import final_of
from yaongi.data.sources.embedded.korean import words
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.basics.suite import QUESTIONS, TASKS, basics_items
from yaongi.eval.choices import Item, Outcome, encode_items, measure
from yaongi.files import sha256_file

ITEMS = basics_items()


def of(task: str) -> list[Item]:
    return [item for item in ITEMS if item.task == f"basics_{task}"]


def test_the_questions_are_always_the_same(tmp_path: Path) -> None:
    """A change of the questions needs another VERSION: scores are compared by it."""
    (tmp_path / "items").write_text("\n".join(map(repr, ITEMS)), encoding="utf-8")
    assert sha256_file(tmp_path / "items")[:16] == "13bc014d693284cb"
    assert basics_items(10)[:10] == ITEMS[:10]


@pytest.mark.parametrize("task", TASKS)
def test_form(task: str) -> None:
    """Four different choices, the right one in each place about equally often, no blank at a context's end."""
    items = [item for item in ITEMS if item.task == task]
    assert len(items) == QUESTIONS
    assert len({(item.context, item.choices) for item in items}) > 0.85 * QUESTIONS
    for item in items:
        assert len(set(item.choices)) == 4, item
        assert 0 <= item.answer < 4
        assert item.context == item.context.rstrip()
        assert item.choices[0]
    places = Counter(item.answer for item in items)
    assert all(70 <= places[place] <= 130 for place in range(4)), places


@pytest.mark.parametrize("task", ["particle", "tense", "speech_level"])
def test_forms_are_balanced(task: str) -> None:
    """Whoever always takes the same form is right one time in four."""
    assert set(Counter(item.answer for item in of(task)).values()) == {QUESTIONS // 4}


@pytest.mark.parametrize("task", TASKS)
def test_guessing_from_the_answers_alone_is_chance(task: str) -> None:
    """Take the choice whose words are right most often elsewhere, not heeding the question: about one in four."""
    items = [item for item in ITEMS if item.task == task]
    right, shown = Counter(), Counter()  # type: ignore[var-annotated]
    for item in items:
        for i, choice in enumerate(item.choices):
            for word in set(re.findall(r"\w+|[^\w\s]", choice)):
                shown[word] += 1
                right[word] += i == item.answer
    found = 0
    for item in items:
        values = []
        for i, choice in enumerate(item.choices):
            rest = set(re.findall(r"\w+|[^\w\s]", choice))
            mine = i == item.answer  # leave this question out
            rates = [(right[w] - mine) / (shown[w] - 1) for w in rest if shown[w] > 20]
            values.append(sum(rates) / len(rates) if rates else 0.25)
        found += max(range(4), key=values.__getitem__) == item.answer
    assert found / len(items) < 0.36, found


@pytest.mark.parametrize("task", TASKS)
def test_a_liking_for_words_is_chance(task: str) -> None:
    """Whoever likes some words more than others, or short answers, or long ones, is right about one time in four."""
    items = [item for item in ITEMS if item.task == task]
    likings: list[Callable[[str], float]] = [lambda choice: -len(choice), len]
    for seed in range(30):
        liked = cache(lambda word, seed=seed: random.Random(f"{seed}/{word}").gauss(0, 1))
        likings.append(lambda choice, liked=liked: sum(map(liked, re.findall(r"\w+|[^\w\s]", choice))))
    rates = []
    for liking in likings:
        found = 0.0
        for item in items:
            values = [liking(choice) for choice in item.choices]
            best = [i for i, value in enumerate(values) if value == max(values)]
            found += (item.answer in best) / len(best)
        rates.append(found / len(items))
    assert 0.22 < sum(rates[2:]) / 30 < 0.28, rates
    assert all(0.18 < rate < 0.32 for rate in rates[:2]), rates[:2]


def test_particles_follow_the_noun() -> None:
    for item in of("particle"):
        noun = item.choices[0].split("이 ")[0].strip()
        closed = final_of(noun) != " "
        assert closed == (item.answer in (0, 2))
        is_object = any(
            after in item.choices[0] for after in ("샀다", "찾고", "주었다", "바라보", "두고 왔다", "떨어뜨렸")
        )
        assert is_object == (item.answer in (2, 3))


def test_sums_are_right() -> None:
    sino = {w: n for n, w in enumerate("영일이삼사오육칠팔구십")}

    def number(word: str) -> int:
        if word in sino:
            return sino[word]
        tens, _, ones = word.partition("십")
        return 10 * (sino[tens] if tens else 1) + (sino[ones] if ones else 0)

    checked = 0
    for item in of("sum"):
        if match := re.fullmatch(r"(\S+) (더하기|빼기) (\S+)[은는]", item.context):
            a, b = number(match[1]), number(match[3])
            assert number(item.choices[item.answer].strip(" .")) == (a + b if match[2] == "더하기" else a - b)
            checked += 1
    assert checked > 200


def test_kinds_and_copies() -> None:
    for item in of("kind"):
        noun = item.context.split("은 무엇")[0].split("는 무엇")[0]
        kind = item.choices[item.answer].strip(" .").removesuffix("다").removesuffix("이")
        assert noun in words()[kind]
        others = [
            c.strip(" .").removesuffix("다").removesuffix("이") for i, c in enumerate(item.choices) if i != item.answer
        ]
        assert all(noun not in words()[other] for other in others), item
    for item in of("copy"):
        assert item.context.split("\n")[1] == item.choices[item.answer].strip()


def test_code_is_python() -> None:
    """Only the right completion of a function, a loop or a module is a program that has all its names."""
    for item in of("code"):
        if item.context.startswith("def "):
            parameter = re.search(r"\((\w+)\)", item.context)
            assert parameter
            assert item.choices[item.answer].strip().startswith(parameter[1])
        for choice in item.choices:
            whole = item.context + choice
            compiles = True
            try:
                compile(whole, "item", "exec")
            except SyntaxError:
                compiles = False
            brackets = not item.context.startswith(("def ", "for ", "import "))
            assert compiles == (not brackets or choice == item.choices[item.answer]), whole


def test_encoded_items(tokenizer: Tokenizer) -> None:
    """Context and choice together are the tokens of the whole text."""
    requests = encode_items(ITEMS[:40], tokenizer.encode)
    texts = [item.context + choice for item in ITEMS[:40] for choice in item.choices]
    for request, text in zip(requests, texts, strict=True):
        assert tokenizer.decode([*request.context, *request.continuation]) == text


def test_measures() -> None:
    outcomes = [Outcome((-1.0, -2.0, -4.0, -6.0), (1, 2, 3, 4), 0), Outcome((-1.0, -2.0), (2, 4), 1)]
    found = measure(outcomes)
    assert found["n"] == 2
    acc = found["metrics"]["acc"]
    assert (acc["value"], acc["chance"]) == (0.5, 0.375)
    assert acc["stderr"] == pytest.approx(0.5)
    assert acc["distance"] == pytest.approx(0.125 / (0.375 * 0.625 / 2) ** 0.5)
    assert found["bits_per_byte"] == pytest.approx(3 / 0.6931471805599453 / 5)
    assert found["margin"] == pytest.approx((3 - 1) / 2)
