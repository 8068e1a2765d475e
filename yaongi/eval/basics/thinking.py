"""Sums in words, copying, and what comes next."""

import random
from collections.abc import Callable, Collection, Sequence

from yaongi.data.sources.embedded.hangul import attach, native, sino
from yaongi.data.sources.embedded.korean import words

Question = tuple[str, Sequence[str], int]  # context, choices, index of the right one

_SEQUENCES: tuple[tuple[str, ...], ...] = (
    ("월요일", "화요일", "수요일", "목요일", "금요일", "토요일", "일요일"),
    ("일월", "이월", "삼월", "사월", "오월", "유월", "칠월", "팔월", "구월", "시월", "십일월", "십이월"),
    ("하나", "둘", "셋", "넷", "다섯", "여섯", "일곱", "여덟", "아홉", "열"),
    ("첫째", "둘째", "셋째", "넷째", "다섯째", "여섯째", "일곱째", "여덟째"),
    ("일", "이", "삼", "사", "오", "육", "칠", "팔", "구", "십"),
    ("가", "나", "다", "라", "마", "바", "사", "아", "자", "차", "카", "타", "파", "하"),
    ("열", "스물", "서른", "마흔", "쉰", "예순", "일흔", "여든", "아흔", "백"),
)


def sum_in_words(rng: random.Random, number: int) -> Question:
    """Ask for a sum or a difference of numbers that are written as words."""
    a, b = rng.randint(2, 12), rng.randint(1, 9)
    if number % 3 == 0:
        thing = rng.choice(words()["과일"])
        context = f"{thing} {native(a)} 개와 {thing} {native(b)} 개를 더하면 모두"
        return _near(rng, a + b, context, lambda n: f" {native(n)} 개이다.")
    if number % 3 == 1:
        context = f"{sino(a)} 더하기 {attach(sino(b), '은')}"
        return _near(rng, a + b, context, lambda n: f" {sino(n)}.")
    context = f"{sino(a + b)} 빼기 {attach(sino(b), '은')}"
    return _near(rng, a, context, lambda n: f" {sino(n)}.")


def copy(rng: random.Random, number: int) -> Question:
    """Ask for a list of words again; in each of the other lists another word stands in one place, always the same."""
    pool = [w for kind in ("물건", "동물", "식물", "음식") for w in words()[kind]]
    picked = rng.sample(pool, 5 + 3)
    shown, strange = picked[: 3 + number % 3], picked[5:]
    place = rng.randrange(len(shown))
    lists = [[*shown[:place], word, *shown[place + 1 :]] for word in (shown[place], *strange)]
    order = rng.sample(range(4), 4)
    context = f"다음 낱말을 그대로 다시 쓰시오.\n{', '.join(shown)}\n답:"
    return context, [f" {', '.join(lists[i])}" for i in order], order.index(0)


def what_comes_next(rng: random.Random, number: int) -> Question:
    """Ask for the next one of a sequence that everybody knows, or of numbers at equal distances."""
    length = 2 + number % 2
    if number % 5 == 0:
        start, distance = rng.randint(1, 30), rng.randint(1, 5)
        shown = [str(start + i * distance) for i in range(3)]
        return _near(rng, start + 3 * distance, f"{', '.join(shown)},", lambda n: f" {n}", set(shown))
    sequence = _SEQUENCES[number % len(_SEQUENCES)]
    place = rng.randrange(length, len(sequence))
    known = sequence[place - length : place]
    others = [word for word in sequence[length:] if word not in (*known, sequence[place])]  # all may be right elsewhere
    choices = [sequence[place], *rng.sample(others, min(3, len(others)))]
    choices += known[::-1][: 4 - len(choices)]
    rng.shuffle(choices)
    return f"{', '.join(known)},", [f" {word}" for word in choices], choices.index(sequence[place])


def _near(
    rng: random.Random, right: int, context: str, say: Callable[[int], str], never: Collection[str] = ()
) -> Question:
    """Return the question with the right number and three others near it, all above zero and none of `never`.

    The right number is the smallest, the second, third or largest equally often: neither a liking for small numbers nor
    one for large ones helps or harms.
    """
    below, above = ([n for n in span if n > 0 and str(n) not in never] for span in _around(right))
    smaller = min(rng.randrange(4), len(below))
    numbers = [right, *rng.sample(below, smaller), *rng.sample(above, 3 - smaller)]
    rng.shuffle(numbers)
    return context, [say(n) for n in numbers], numbers.index(right)


def _around(number: int) -> tuple[range, range]:
    """Return the four numbers below, and the four above."""
    return range(number - 4, number), range(number + 1, number + 5)
