"""Conversations of the package: eight things that a tuned model must do, each with exactly one right answer.

Every question holds all that its answer needs, so what is learnt is to follow an instruction and to end. Words of the
held-out split never occur in the training split. There most words are common nouns, words of the package's prose,
English ones, or made up, so that words are copied and not recalled; of fewer conversations, which a small model learns,
words of the prose or made up. Nothing is learnt of the world: copying, counting, sorting by number, the last word, a
formal ending, a sum, yes or no, and a refusal, all in Korean.

The preferences are pairs of the same sentence with a formal and an informal ending.
"""

import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from yaongi.data.sources.embedded.hangul import attach
from yaongi.data.sources.embedded.korean import nouns, predicates, prose, templates, words
from yaongi.data.sources.embedded.stdlib import english_documents
from yaongi.data.sources.source import TRAIN, VAL

SEED = 20261128
CONVERSATIONS, PAIRS = 20_000, 4_000  # in the training split
MANY = 100_000  # conversations of the training split from which on words are of all kinds
_TRAIN_FOR_VAL = 20  # rows of the training split for each that is held out
_FIRST_HELD_OUT, _HELD_OUT_ONE_IN = 2, 5
_OTHER = 0.8  # share of the training split's words that are other ones, of these kinds
_FEW_KINDS = {"made up": 0.5, "prose": 0.5}
_KOREAN = {"made up": 0.3, "prose": 0.4, "noun": 0.3}  # those to which a particle can be attached
_ALL_KINDS = {"made up": 0.25, "prose": 0.3, "noun": 0.2, "english": 0.2, "number": 0.05}
_COMMON_SYLLABLE = 0.3  # share of a made-up word's syllables that are any of the common ones, so that all are met
_COUNTED = ("재료", "과일", "물건")
_PERSONS = ("사람", "가족", "직업")
_ACTIONS = {  # what is done to which kind of thing
    "음식": ("먹다", "만들다", "사다"),
    "과일": ("먹다", "사다", "씻다", "받다"),
    "물건": ("사다", "찾다", "받다", "고치다"),
    "책": ("읽다", "사다", "고르다"),
    "식물": ("심다", "보다"),
    "동물": ("보다", "찾다"),
}
_SECRETS = ("비밀번호", "통장 번호", "전화번호", "집 주소", "일기", "진료 기록", "카드 번호", "성적표", "월급", "쪽지")
_SYSTEMS = ("당신은 친절한 도우미입니다.", "짧고 바르게 대답하세요.", "한국어로 대답하세요.")


@dataclass(frozen=True)
class Origin:
    """Where the words of a conversation come from."""

    split: str
    many: bool = False  # whether there are MANY conversations


Exchange = tuple[str, str]  # question, answer
Behaviour = Callable[[random.Random, Origin], Exchange]


def instruction_rows(split: str, conversations: int = CONVERSATIONS) -> Iterator[dict[str, Any]]:
    """Yield conversations of one exchange, every third of two to four, no two of them alike.

    Args:
        conversations: how many in the training split; the held-out split has a twentieth.

    Returns:
        Rows of `messages` and, for each answer in them, the name of its behaviour. The answer is the only right one.
    """
    names, origin = tuple(BEHAVIOURS), Origin(split, conversations >= MANY)
    seen: set[str] = set()
    number = 0
    while len(seen) < _rows_of(split, conversations):
        rng = random.Random(f"instructions/{SEED}/{split}/{number}")
        exchanges = rng.randint(2, 4) if number % 3 == 2 else 1
        chosen = [names[number % len(names)], *rng.choices(names, k=exchanges - 1)]
        number += 1
        messages = [{"role": "system", "content": rng.choice(_SYSTEMS)}] if rng.random() < 0.2 else []
        for name in chosen:
            question, answer = BEHAVIOURS[name](rng, origin)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if (key := repr(messages)) not in seen:
            seen.add(key)
            yield {"messages": messages, "behaviours": chosen}


def preference_rows(split: str, pairs: int = PAIRS) -> Iterator[dict[str, Any]]:
    """Yield pairs of answers to a question, the chosen one with a formal ending; no question twice.

    Args:
        pairs: how many in the training split; the held-out split has a twentieth.
    """
    seen: set[str] = set()
    number = 0
    while len(seen) < _rows_of(split, pairs):
        rng = random.Random(f"preferences/{SEED}/{split}/{number}")
        number += 1
        place, thing, action = _scene(rng, split)
        ask = rng.choice(
            (
                "다음 낱말로 한 문장을 쓰세요: {}",
                "이 낱말들로 문장을 지으세요: {}",
                "{}\n이 낱말들을 써서 한 문장으로 말하세요.",
            )
        )
        question = ask.format(", ".join((place, thing, action)))
        if question not in seen:
            seen.add(question)
            chosen, rejected = (_sentence(place, thing, action, level) for level in ("formal", "casual"))
            yield {"prompt": question, "chosen": chosen, "rejected": rejected}


def is_right(expected: str, answer: str) -> bool:
    """Return whether an answer is the expected one, but for blanks at its ends and the form of its syllables."""
    return unicodedata.normalize("NFC", answer).strip() == expected


@cache
def held_out_words() -> frozenset[str]:
    """Return the words that the held-out split alone uses: every fifth of each kind, wherever else it stands."""
    return frozenset(word for found in words().values() for word in found[_FIRST_HELD_OUT::_HELD_OUT_ONE_IN])


def _rows_of(split: str, training: int) -> int:
    return training if split == TRAIN else -(-training // _TRAIN_FOR_VAL)


@cache
def _pool(split: str) -> Mapping[str, Sequence[str]]:
    """Return the words of a split, without those that hold a blank."""
    return {
        kind: [word for word in found if " " not in word and (word in held_out_words()) == (split == VAL)]
        for kind, found in words().items()
    }


@cache
def _all_words(split: str) -> tuple[str, ...]:
    return tuple(sorted({word for found in _pool(split).values() for word in found}))


@cache
def _known_syllables() -> str:
    """Return the syllables of the training split's words, each as often as it occurs there."""
    return "".join(_all_words(TRAIN))


@cache
def _common_syllables() -> str:
    """Return the 2,350 syllables of KS X 1001, which EUC-KR writes in two bytes."""
    return "".join(
        syllable for syllable in map(chr, range(ord("가"), ord("힣") + 1)) if len(syllable.encode("euc-kr")) == 2
    )


@cache
def _prose_words() -> tuple[str, ...]:
    """Return the words of the package's prose and sentences, but those that hold a held-out one with a particle."""
    found = set(re.findall("[가-힣]+", "\n".join((*prose(), *_template_lines()))))
    long = [word for word in held_out_words() if len(word) > 1]
    return tuple(sorted(w for w in found - held_out_words() if not any(word in w for word in long)))


@cache
def _nouns() -> tuple[str, ...]:
    """Return the common nouns but the held-out ones, which may be parts of others: 철학 of 철학자."""
    return tuple(sorted(set(nouns()) - held_out_words()))


@cache
def _english_words() -> tuple[str, ...]:
    """Return the words of the installed Python's documentation, thousands of different tokens."""
    return tuple(sorted({word for text in english_documents() for word in re.findall("[A-Za-z]+", text)}))


_WRITTEN = {"prose": _prose_words, "noun": _nouns, "english": _english_words}


def _template_lines() -> Iterator[str]:
    return (line for kind in templates().values() for section in kind.values() for line in section)


def _made_up_word(rng: random.Random) -> str:
    length = rng.choices((1, 2, 3, 4), (1, 5, 3, 1))[0]
    return "".join(
        rng.choice(_common_syllables() if rng.random() < _COMMON_SYLLABLE else _known_syllables())
        for _ in range(length)
    )


def _or_other(rng: random.Random, origin: Origin, word: str, kinds: Mapping[str, float] = _KOREAN) -> str:
    """Return the word or, in the training split, most often another in its place: if MANY, of these kinds.

    The lists of the training split have 276 words, which a model learns by heart instead of copying what it reads.
    """
    if origin.split == VAL or rng.random() >= _OTHER:
        return word
    kinds = kinds if origin.many else _FEW_KINDS
    (kind,) = rng.choices(tuple(kinds), tuple(kinds.values()))
    if kind == "number":
        return str(rng.randrange(10 ** rng.randint(1, 6)))
    other = _made_up_word(rng) if kind == "made up" else rng.choice(_WRITTEN[kind]())
    return word if other in held_out_words() else other


def _listed(
    rng: random.Random, origin: Origin, fewest: int, most: int, kinds: Mapping[str, float] = _ALL_KINDS
) -> list[str]:
    """Return different words."""
    found: list[str] = []
    count = rng.randint(fewest, most)
    while len(found) < count:
        word = _or_other(rng, origin, rng.choice(_all_words(origin.split)), kinds)
        if word not in found:
            found.append(word)
    return found


def _ask(rng: random.Random, asked: Sequence[str], found: Sequence[str]) -> str:
    """Return one of the questions, with the words before or behind it."""
    listed, question = ", ".join(found), rng.choice(asked)
    return rng.choice((f"{question}: {listed}", f"{question}.\n{listed}", f"{listed}\n{question}."))


def _of_words(*, fewest: int, most: int, answer: Callable[[list[str]], str], asked: Sequence[str]) -> Behaviour:
    """Return what asks one of the questions about so many words."""

    def exchange(rng: random.Random, origin: Origin) -> Exchange:
        found = _listed(rng, origin, fewest, most)
        return _ask(rng, asked, found), answer(found)

    return exchange


_copy = _of_words(
    fewest=1,
    most=6,
    answer=", ".join,
    asked=(
        "다음을 그대로 쓰세요",
        "이 낱말을 똑같이 다시 쓰세요",
        "그대로 따라 쓰세요",
        "바꾸지 말고 그대로 옮겨 쓰세요",
    ),
)
_count = _of_words(
    fewest=1,
    most=7,
    answer=lambda found: f"{len(found)}개입니다.",
    asked=(
        "낱말이 몇 개인지 쓰세요",
        "모두 몇 개인지 세어 보세요",
        "낱말의 수를 말하세요",
        "몇 개가 있는지 알려 주세요",
    ),
)
_last_word = _of_words(
    fewest=2,
    most=6,
    answer=lambda found: f"{found[-1]}입니다.",
    asked=(
        "마지막 낱말을 말하세요",
        "맨 끝에 있는 낱말을 쓰세요",
        "맨 나중에 나온 낱말을 알려 주세요",
        "끝 낱말이 무엇인지 쓰세요",
    ),
)


def _formal_ending(rng: random.Random, origin: Origin) -> Exchange:
    *scene, action = _scene(rng, origin.split)
    who, place, thing = (_or_other(rng, origin, word) for word in (rng.choice(_pool(origin.split)["사람"]), *scene))
    given, wanted = (
        f"{attach(who, '은')} {_sentence(place, thing, action, level)}"
        for level in (rng.choice(("plain", "casual")), "formal")
    )
    asked = ("'-습니다'로 끝나게 바꾸세요", "높임말로 바꾸세요", "격식 있게 고쳐 쓰세요", "끝을 '-습니다'로 고치세요")
    return _ask(rng, asked, [given]), wanted


def _sum(rng: random.Random, origin: Origin) -> Exchange:
    things = rng.sample([word for kind in _COUNTED for word in _pool(origin.split)[kind]], 2)
    first, second = (_or_other(rng, origin, word) for word in things)
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    counted = f"{first} {a}개와 {second} {b}개"
    asked = (
        "{}를 더하면 모두 몇 개입니까?",
        "{}가 있습니다. 모두 몇 개입니까?",
        "{}를 합하면 몇 개가 됩니까?",
        "{}, 합은 몇 개입니까?",
    )
    return rng.choice(asked).format(counted), f"{a + b}개입니다."


def _sort(rng: random.Random, origin: Origin) -> Exchange:
    found = _listed(rng, origin, 2, 4)
    count = dict(zip(found, rng.sample(range(1, 10), len(found)), strict=True))
    most_first = rng.random() < 0.5
    asked = ("수가 {} 것부터 쓰세요", "{} 것부터 늘어놓으세요", "개수가 {} 차례로 쓰세요", "{} 것부터 정리해 주세요")
    counted = [f"{word} {count[word]}개" for word in found]
    answer = ", ".join(sorted(found, key=count.__getitem__, reverse=most_first))
    return _ask(rng, [each.format("많은" if most_first else "적은") for each in asked], counted), answer


def _yes_or_no(rng: random.Random, origin: Origin) -> Exchange:
    found = _listed(rng, origin, 3, 6, _KOREAN)
    there = rng.random() < 0.5
    wanted = rng.choice(found[:-1]) if there else found[-1]
    shown = found[:-1]
    question = rng.choice(("이 가운데 {} 있습니까?", "여기에 {} 있습니까?", "{} 나옵니까?")).format(
        attach(wanted, "이")
    )
    listed = ", ".join(shown)
    answer = "네, 있습니다." if there else "아니요, 없습니다."
    return rng.choice((f"{listed}\n{question}", f"{question} {listed}", f"{question}\n{listed}")), answer


def _refuse(rng: random.Random, origin: Origin) -> Exchange:
    who = _or_other(rng, origin, rng.choice([word for kind in _PERSONS for word in _pool(origin.split)[kind]]))
    what = rng.choice(_SECRETS)
    asked = (
        "{} 알려 주세요.",
        "{} 몰래 알려 주세요.",
        "{} 말해 주세요.",
        "{} 저에게만 알려 주세요.",
        "{} 찾아서 알려 주세요.",
    )
    question = rng.choice(asked).format(f"{who}의 {attach(what, '을')}")
    return question, f"죄송하지만 {who}의 {attach(what, '은')} 알려 드릴 수 없습니다."


def _scene(rng: random.Random, split: str) -> tuple[str, str, str]:
    """Return a place, a thing and a verb that fit together."""
    kind = rng.choice(tuple(_ACTIONS))
    return rng.choice(_pool(split)["장소"]), rng.choice(_pool(split)[kind]), rng.choice(_ACTIONS[kind])


def _sentence(place: str, thing: str, action: str, level: str) -> str:
    return f"{place}에서 {attach(thing, '을')} {predicates()[action].form('과거', level)}."


BEHAVIOURS: Mapping[str, Behaviour] = {
    "copy": _copy,
    "count": _count,
    "sort": _sort,
    "last word": _last_word,
    "formal ending": _formal_ending,
    "sum": _sum,
    "yes or no": _yes_or_no,
    "refuse": _refuse,
}
"""What is asked of a model, by name; each makes a question and its only right answer."""
