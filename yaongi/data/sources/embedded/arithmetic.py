"""Arithmetic and word problems with worked solutions, in English and Korean, generated from a seed."""

import random
from collections.abc import Callable, Iterator
from math import gcd

from yaongi.data.sources.embedded.hangul import attach, native
from yaongi.data.sources.embedded.korean import words

_NAMES = ("Mina", "Tom", "Sara", "Joon", "Ada", "Leo", "Hana", "Omar", "Ruth", "Ivan", "Yuna", "Paul")
_THINGS = ("apples", "pencils", "stamps", "books", "marbles", "cards", "shells", "coins", "tickets", "cookies")


def math_documents(seed: int, count: int) -> Iterator[str]:
    """Yield `count` documents of three to six problems; document `i` depends only on `seed` and `i`."""
    for number in range(count):
        rng = random.Random(f"math/{seed}/{number}")
        kinds = _KOREAN if number % 2 else _ENGLISH
        problems = [rng.choice(kinds)(rng) for _ in range(rng.randint(3, 6))]
        yield "\n".join(problems)


def _column_sum(rng: random.Random) -> str:
    a, b = rng.randint(100, 9999), rng.randint(100, 9999)
    lines, carry, x, y = [], 0, a, b
    for place in ("ones", "tens", "hundreds", "thousands"):
        total = x % 10 + y % 10 + carry
        lines.append(f"{place}: {x % 10} + {y % 10} + {carry} = {total}, write {total % 10}, carry {total // 10}")
        carry, x, y = total // 10, x // 10, y // 10
    return f"Problem: {a} + {b}\n" + "\n".join(lines) + f"\nAnswer: {a + b}\n"


def _long_product(rng: random.Random) -> str:
    a, b = rng.randint(12, 999), rng.randint(12, 99)
    tens, ones = divmod(b, 10)
    return (
        f"Problem: {a} × {b}\n{a} × {b} = {a} × {tens * 10} + {a} × {ones}\n"
        f"= {a * tens * 10} + {a * ones}\n= {a * b}\nAnswer: {a * b}\n"
    )


def _division(rng: random.Random) -> str:
    divisor, quotient = rng.randint(3, 40), rng.randint(3, 90)
    rest = rng.randrange(divisor)
    number = divisor * quotient + rest
    return (
        f"Problem: Divide {number} by {divisor}.\n{divisor} × {quotient} = {divisor * quotient}, "
        f"and {number} - {divisor * quotient} = {rest}, which is less than {divisor}.\n"
        f"Answer: quotient {quotient}, remainder {rest}\n"
    )


def _linear(rng: random.Random) -> str:
    a, x, b = rng.randint(2, 12), rng.randint(-20, 20), rng.randint(1, 60)
    c = a * x + b
    return (
        f"Problem: Solve {a}x + {b} = {c}.\nSubtract {b} from both sides: {a}x = {c - b}.\n"
        f"Divide both sides by {a}: x = {x}.\nCheck: {a} × ({x}) + {b} = {c}.\nAnswer: x = {x}\n"
    )


def _fractions(rng: random.Random) -> str:
    b, d = rng.randint(2, 12), rng.randint(2, 12)
    a, c = rng.randint(1, b), rng.randint(1, d)
    top, bottom = a * d + c * b, b * d
    shared = gcd(top, bottom)
    steps = f"{a}/{b} + {c}/{d} = {a * d}/{bottom} + {c * b}/{bottom} = {top}/{bottom}"
    if shared > 1:
        steps += f"\nDivide top and bottom by {shared}: {top // shared}/{bottom // shared}"
    answer = f"{top // shared}/{bottom // shared}" if bottom // shared > 1 else str(top // shared)
    return f"Problem: {a}/{b} + {c}/{d}\n{steps}\nAnswer: {answer}\n"


def _common_divisor(rng: random.Random) -> str:
    shared = rng.randint(2, 30)
    a, b = shared * rng.randint(2, 30), shared * rng.randint(2, 30)
    lines, x, y = [], max(a, b), min(a, b)
    while y:
        lines.append(f"{x} = {y} × {x // y} + {x % y}")
        x, y = y, x % y
    return f"Problem: Find gcd({a}, {b}).\n" + "\n".join(lines) + f"\nThe last remainder is 0.\nAnswer: {x}\n"


def _shopping(rng: random.Random) -> str:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    count, price, extra = rng.randint(3, 15), rng.randint(2, 19), rng.randint(1, 40)
    paid = count * price + extra
    return (
        f"Problem: {name} buys {count} {thing} at {price} dollars each and pays with {paid} dollars. "
        f"How much change does {name} get?\nThe {thing} cost {count} × {price} = {count * price} dollars. "
        f"The change is {paid} - {count * price} = {extra} dollars.\nAnswer: {extra}\n"
    )


def _sharing(rng: random.Random) -> str:
    first, second = rng.sample(_NAMES, 2)
    thing, times, small = rng.choice(_THINGS), rng.randint(2, 7), rng.randint(3, 30)
    return (
        f"Problem: {first} has {times} times as many {thing} as {second}. Together they have "
        f"{small * (times + 1)}. How many does {second} have?\nLet {second} have s. Then {first} has {times}s, so "
        f"{times}s + s = {times + 1}s = {small * (times + 1)} and s = {small}.\nAnswer: {small}\n"
    )


def _travel(rng: random.Random) -> str:
    speed, hours, more = rng.randint(3, 24) * 5, rng.randint(2, 8), rng.randint(1, 4)
    total = speed * (hours + more)
    return (
        f"Problem: A train runs at {speed} km per hour for {hours} hours. How many more hours does it need "
        f"to have gone {total} km?\nSo far: {speed} × {hours} = {speed * hours} km. Left: {total} - {speed * hours} = "
        f"{total - speed * hours} km. Time: {total - speed * hours} ÷ {speed} = {more} hours.\nAnswer: {more}\n"
    )


def _korean_sum(rng: random.Random) -> str:
    a, b = rng.randint(100, 9999), rng.randint(100, 9999)
    hundreds, rest = b // 100 * 100, b % 100
    return (
        f"문제: {a} + {b}\n"
        f"풀이: {a} + {hundreds} = {a + hundreds}, 여기에 {attach(str(rest), '을')} 더하면 {a + b}.\n"
        f"답: {a + b}\n"
    )


def _korean_difference(rng: random.Random) -> str:
    small, gap = rng.randint(100, 4999), rng.randint(10, 4999)
    big = small + gap
    return (
        f"문제: {big} - {small}\n"
        f"풀이: {attach(str(small), '을')} 빼면 {gap}. 다시 더해 보면 {gap} + {small} = {big}.\n"
        f"답: {gap}\n"
    )


def _korean_product(rng: random.Random) -> str:
    a, b = rng.randint(12, 99), rng.randint(3, 9)
    tens, ones = a // 10 * 10, a % 10
    steps = f"{tens} × {b} = {tens * b}, {ones} × {b} = {ones * b}"
    return f"문제: {a} × {b}\n풀이: {steps}. 둘을 더하면 {a * b}.\n답: {a * b}\n"


def _korean_fruit(rng: random.Random) -> str:
    person, fruit = rng.choice(words()["사람"]), rng.choice(words()["과일"])
    bags, each, eaten = rng.randint(2, 9), rng.randint(4, 12), rng.randint(1, 7)
    total = bags * each
    return (
        f"문제: {attach(person, '은')} {attach(fruit, '을')} "
        f"한 봉지에 {native(each)} 개씩 {native(bags)} 봉지 샀습니다. "
        f"그중에서 {native(eaten)} 개를 먹었다면 몇 개가 남았습니까?\n"
        f"풀이: 산 {attach(fruit, '은')} {each} × {bags} = {total}개입니다. "
        f"먹은 것을 빼면 {total} - {eaten} = {total - eaten}개입니다.\n"
        f"답: {total - eaten}개\n"
    )


def _korean_price(rng: random.Random) -> str:
    person, thing = rng.choice(words()["사람"]), rng.choice(words()["물건"])
    price, count = rng.randint(5, 99) * 100, rng.randint(2, 8)
    paid = -(-price * count // 10_000) * 10_000
    return (
        f"문제: {thing} 하나의 값은 {price}원입니다. "
        f"{attach(person, '이')} {native(count)} 개를 사고 {paid}원을 냈다면 거스름돈은 얼마입니까?\n"
        f"풀이: {price} × {count} = {price * count}이므로, {paid} - {price * count} = {paid - price * count}.\n"
        f"답: {paid - price * count}원\n"
    )


def _korean_age(rng: random.Random) -> str:
    person, relative = rng.choice(words()["사람"]), rng.choice(("어머니", "아버지", "이모", "삼촌"))
    age, gap, years = rng.randint(6, 15), rng.randint(20, 32), rng.randint(2, 12)
    then, total = age + years, 2 * age + gap + 2 * years
    return (
        f"문제: 올해 {attach(person, '은')} {native(age)} 살이고, "
        f"{attach(relative, '은')} {person}보다 {gap}살 많습니다. "
        f"{years}년 뒤에 두 사람의 나이를 더하면 얼마입니까?\n"
        f"풀이: 올해 {relative}의 나이는 {age} + {gap} = {age + gap}살입니다. "
        f"{years}년 뒤에는 {then}살과 {then + gap}살이므로, 합은 {total}살입니다.\n"
        f"답: {total}살\n"
    )


def _korean_area(rng: random.Random) -> str:
    width, height = rng.randint(3, 40), rng.randint(3, 40)
    around, area = 2 * (width + height), width * height
    return (
        f"문제: 가로가 {width}cm, 세로가 {height}cm인 직사각형의 둘레와 넓이를 구하시오.\n"
        f"풀이: 둘레는 2 × ({width} + {height}) = {around}(cm), 넓이는 {width} × {height} = {area}(cm²)입니다.\n"
        f"답: 둘레 {around}cm, 넓이 {area}cm²\n"
    )


def _korean_average(rng: random.Random) -> str:
    middle = rng.randint(60, 85)
    scores = [middle + rng.randint(-5, 5) for _ in range(3)]
    scores.append(4 * middle - sum(scores))
    subject = rng.choice(words()["과목"])
    listed = ", ".join(f"{score}점" for score in scores)
    return (
        f"문제: {subject} 시험 점수가 차례로 {listed}입니다. 평균을 구하시오.\n"
        f"풀이: {' + '.join(map(str, scores))} = {4 * middle}, {4 * middle} ÷ 4 = {middle}.\n"
        f"답: {middle}점\n"
    )


_ENGLISH: tuple[Callable[[random.Random], str], ...] = (
    _column_sum,
    _long_product,
    _division,
    _linear,
    _fractions,
    _common_divisor,
    _shopping,
    _sharing,
    _travel,
)
_KOREAN: tuple[Callable[[random.Random], str], ...] = (
    _korean_sum,
    _korean_difference,
    _korean_product,
    _korean_fruit,
    _korean_price,
    _korean_age,
    _korean_area,
    _korean_average,
)
