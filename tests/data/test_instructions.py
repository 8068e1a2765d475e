"""The conversations of the package: always the same, all of them right, and held-out words are held out."""

import itertools
import re
from collections import Counter
from typing import Any

import pytest

from yaongi.data.sources.embedded.hangul import attach
from yaongi.data.sources.embedded.instructions import (
    BEHAVIOURS,
    CONVERSATIONS,
    MANY,
    held_out_words,
    instruction_rows,
    is_right,
    preference_rows,
)
from yaongi.data.sources.embedded.korean import words
from yaongi.data.sources.row_sources import open_row_sources


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Return a tenth of the training split."""
    return list(instruction_rows("train", CONVERSATIONS // 10))


@pytest.fixture(scope="module")
def of_many() -> list[dict[str, Any]]:
    """Return rows of so many conversations that their words are of all kinds."""
    return list(itertools.islice(instruction_rows("train", MANY), 800))


def exchanges(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return behaviour, question and answer of every exchange."""
    found = []
    for row in rows:
        talk = [message for message in row["messages"] if message["role"] != "system"]
        assert [message["role"] for message in talk] == ["user", "assistant"] * len(row["behaviours"])
        found += [
            (name, asked["content"], answered["content"])
            for name, asked, answered in zip(row["behaviours"], talk[::2], talk[1::2], strict=True)
        ]
    return found


def right_answer(behaviour: str, question: str) -> str:
    """Return the answer, found by other means than the generator's."""
    lines = re.split(r"\n|: |\? (?=\S)", question)
    listed = max(lines, key=lambda part: part.count(",")) if "," in question else next(p for p in lines if " " not in p)
    words = listed.split(", ")
    if behaviour == "copy":
        return ", ".join(words)
    if behaviour == "sort":
        counted = [(int(count), word) for word, count in re.findall(r"(\S+) (\d)개", listed)]
        return ", ".join(word for _, word in sorted(counted, reverse="많은" in question))
    if behaviour in ("count", "last word"):
        return f"{len(words)}개입니다." if behaviour == "count" else f"{words[-1]}입니다."
    if behaviour == "yes or no":
        (asked,) = re.findall(r"(\S+)[이가] (?:있습|나옵)니까\?", question)
        return "네, 있습니다." if asked in words else "아니요, 없습니다."
    raise KeyError(behaviour)


def test_every_answer_is_right(rows: list[dict[str, Any]], of_many: list[dict[str, Any]]) -> None:
    checked: Counter[str] = Counter()
    for behaviour, question, answer in exchanges(rows + of_many):
        checked[behaviour] += 1
        if behaviour == "sum":
            total = sum(map(int, re.findall(r"\d+", question)))
            assert answer == f"{total}개입니다."
        elif behaviour == "formal ending":
            said = re.search(r"\S+[은는] \S+에서 \S+[을를] \S+\.", question)
            assert said
            assert answer.split()[:-1] == said[0].split()[:-1]
            assert answer.endswith("습니다.")
            assert not said[0].endswith("습니다.")
        elif behaviour == "refuse":
            (who, what) = re.match(r"(\S+)의 (.+?)[을를] ", question).groups()  # type: ignore[union-attr]
            assert answer == f"죄송하지만 {who}의 {attach(what, '은')} 알려 드릴 수 없습니다."
        else:
            assert answer == right_answer(behaviour, question), question
    assert set(checked) == set(BEHAVIOURS)
    assert min(checked.values()) > 0.8 * max(checked.values()), checked


def test_a_third_of_the_conversations_have_several_exchanges(rows: list[dict[str, Any]]) -> None:
    counts = Counter(len(row["behaviours"]) for row in rows)
    assert set(counts) == {1, 2, 3, 4}
    assert counts[1] / len(rows) == pytest.approx(2 / 3, abs=0.01)
    single = Counter(row["behaviours"][0] for row in rows if len(row["behaviours"]) == 1)
    assert set(single) == set(BEHAVIOURS)


def test_they_are_always_the_same_and_all_different(rows: list[dict[str, Any]]) -> None:
    assert list(instruction_rows("train", 50)) == rows[:50]
    assert len({repr(row) for row in rows}) == len(rows) == 2000
    assert sum(1 for _ in instruction_rows("val", 2000)) == 100


def test_held_out_words_are_held_out(rows: list[dict[str, Any]]) -> None:
    held_out = list(instruction_rows("val", 4000))

    def listed(rows: list[dict[str, Any]]) -> set[str]:
        return {word for behaviour, _, answer in exchanges(rows) if behaviour == "copy" for word in answer.split(", ")}

    assert listed(held_out) <= held_out_words()
    assert not listed(rows) & held_out_words()
    assert len(listed(held_out)) >= 60
    known = {word for found in words().values() for word in found}
    other = listed(rows) - known
    assert len(other) / len(listed(rows)) > 0.5, "most words of the training split are other ones than the lists'"
    assert not any(held_out in word for word in other for held_out in held_out_words() if len(held_out) > 2)
    assert listed(held_out) <= known
    asked = [{question for _, question, _ in exchanges(part)} for part in (rows, held_out)]
    assert not asked[0] & asked[1]


def test_many_conversations_have_more_kinds_of_words(rows: list[dict[str, Any]], of_many: list[dict[str, Any]]) -> None:
    few, many = ([question for _, question, _ in exchanges(part)] for part in (rows, of_many))
    assert not any(re.search("[A-Za-z]", question) for question in few)
    assert sum(re.search("[A-Za-z]", question) is not None for question in many) > len(many) / 5
    assert not held_out_words() & {word for question in many for word in re.findall("[가-힣]+", question)}


def test_an_answer_is_right_whatever_blanks_it_has_at_its_ends() -> None:
    assert is_right("네, 있습니다.", " 네, 있습니다.\n")
    assert is_right("각", "\u1100\u1161\u11a8")
    assert not is_right("네, 있습니다.", "네 있습니다.")


def test_preferences_differ_in_their_ending_alone() -> None:
    for split, count in (("train", 300), ("val", 15)):
        rows = list(preference_rows(split, 300))
        assert len({row["prompt"] for row in rows}) == len(rows) == count
        for row in rows:
            chosen, rejected = row["chosen"], row["rejected"]
            assert chosen.endswith("습니다.")
            assert rejected == chosen.replace("습니다.", "어.")
            assert all(part in row["prompt"] for part in (chosen.split("에서")[0], chosen.split()[1][:-1]))


def test_they_are_a_source() -> None:
    train, val = open_row_sources(["embedded:instructions:40"])
    assert (train.split, val.split) == ("train", "val")
    assert [len(list(source.files[0].rows())) for source in (train, val)] == [40, 2]
    again, _ = open_row_sources(["embedded:instructions:40"])
    other, _ = open_row_sources(["embedded:instructions:41"])
    assert train.files[0].fingerprint() == again.files[0].fingerprint() != other.files[0].fingerprint()
    assert {"prompt", "chosen", "rejected"} == set(next(open_row_sources(["embedded:preferences"])[0].files[0].rows()))
    for wrong in ("embedded", "embedded:other", "embedded:instructions:0"):
        with pytest.raises(ValueError, match="must be embedded:instructions or embedded:preferences, or …:COUNT, got"):
            open_row_sources([wrong])
