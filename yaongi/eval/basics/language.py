"""Korean: particles, tense, speech levels, and what kind of thing a word names.

The four choices of a question are always the same four forms, and each is right equally often: a model that doesn't
heed the context is right one time in four.
"""

import random
from collections.abc import Sequence

from yaongi.data.sources.embedded.hangul import LEVELS, attach, copula, final_of
from yaongi.data.sources.embedded.korean import predicates, words

Question = tuple[str, Sequence[str], int]  # context, choices, index of the right one

_SUBJECT = (" 없어졌다.", " 마음에 들었다.", " 눈에 띄었다.", " 아직 남아 있다.", " 꼭 필요하다.", " 보이지 않는다.")
_OBJECT = (" 샀다.", " 찾고 있었다.", " 친구에게 주었다.", " 오래 바라보았다.", " 집에 두고 왔다.", " 떨어뜨렸다.")
_BEFORE_SUBJECT = ("어제부터", "그런데", "이상하게도", "가게에 가 보니", "아침에 일어나니", "우리 집에는")
_BEFORE_OBJECT = ("나는 어제", "우리는 시장에서", "아이는 길에서", "누나는 아침에", "그 사람은 말없이", "나는 가게에서")

_VERBS = (
    ("책을", "읽다"),
    ("편지를", "쓰다"),
    ("음악을", "듣다"),
    ("김밥을", "만들다"),
    ("녹차를", "마시다"),
    ("떡볶이를", "먹다"),
    ("사과를", "사다"),
    ("영화를", "보다"),
)
_PLACES = ("집에서", "학교에서", "공원에서", "도서관에서", "시장에서", "강가에서")
_TIMES = (
    ("어제", "지난주에", "조금 전에", "작년에"),
    ("내일", "다음 주에", "모레", "내년에"),
    ("지금", "바로 지금", "지금 이 순간"),
    ("자, 다 같이", "얘들아, 함께", "그러지 말고 같이"),
)
_KINDS = ("과일", "동물", "식물", "음식", "도시", "직업", "과목", "음료")


def particle(rng: random.Random, number: int) -> Question:
    """Ask for 이, 가, 을 or 를: by the noun's final consonant, and by whether it is the subject or the object."""
    closed, is_object = number % 2, number // 2 % 2
    nouns = [w for kind in ("물건", "과일") for w in words()[kind] if (final_of(w) != " ") == closed]
    noun = rng.choice(nouns)
    before, after = (
        rng.choice(_BEFORE_OBJECT if is_object else _BEFORE_SUBJECT),
        rng.choice(_OBJECT if is_object else _SUBJECT),
    )
    forms = ("이", "가", "을", "를")
    right = attach(noun, "을" if is_object else "이")
    return before, [f" {noun}{form}{after}" for form in forms], forms.index(right.removeprefix(noun))


def tense(rng: random.Random, number: int) -> Question:
    """Ask for the verb's form after a time: past, future, progressive, or a proposal."""
    thing, verb = rng.choice(_VERBS)
    predicate = predicates()[verb]
    right = number % 4
    subject = "" if right == 3 else rng.choice(("우리는 ", "아이들은 ", "친구들은 "))
    context = f"{rng.choice(_TIMES[right])} {subject}{rng.choice(_PLACES)} {thing}"
    forms = [predicate.form("과거", "plain"), predicate.form("미래", "plain")]
    forms += [f"{predicate.stem}고 있다", f"{predicate.stem}자"]
    return context, [f" {form}." for form in forms], right


def speech_level(rng: random.Random, number: int) -> Question:
    """Ask for the ending that goes on in the speech level of the two sentences before."""
    level = LEVELS[number % 4]
    chosen = rng.sample(_VERBS, 3)
    said = [f"{rng.choice(_PLACES)} {thing} {predicates()[verb].form('과거', level)}." for thing, verb in chosen[:2]]
    thing, verb = chosen[2]
    context = f"{said[0]} {said[1]} 그리고 {rng.choice(_PLACES)} {thing}"
    return context, [f" {predicates()[verb].form('과거', other)}." for other in LEVELS], number % 4


def kind_of_thing(rng: random.Random, number: int) -> Question:
    """Ask what a common word names: a fruit, an animal, a city, and so on."""
    right = _KINDS[number % len(_KINDS)]
    others = rng.sample([kind for kind in _KINDS if kind != right], 3)
    choices = [right, *others]
    rng.shuffle(choices)
    word = rng.choice(words()[right])
    return (
        f"{attach(word, '은')} 무엇인가? {attach(word, '은')}",
        [f" {copula(kind, 'plain')}." for kind in choices],
        choices.index(right),
    )
