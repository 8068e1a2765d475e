"""Korean word forms: particles by the final consonant, endings by speech level, number words.

It has only what the sentence generator needs. Syllables are composed and taken apart by their code points
(U+AC00 + 588 · initial + 28 · vowel + final), so endings attach by rule; irregular verbs list their forms.
"""

from dataclasses import dataclass

_FIRST, _LAST = 0xAC00, 0xD7A3
_FINALS = " ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"
_DIGIT_FINALS = dict(zip("0123456789", "ㅇㄹ ㅁ  ㄱㄹㄹ ", strict=True))  # 영 일 이 삼 사 오 육 칠 팔 구
_PARTICLES = {
    "은": ("은", "는"),
    "이": ("이", "가"),
    "을": ("을", "를"),
    "과": ("과", "와"),
    "아": ("아", "야"),
    "이나": ("이나", "나"),
    "이랑": ("이랑", "랑"),
    "이라는": ("이라는", "라는"),
    "이라도": ("이라도", "라도"),
    "이란": ("이란", "란"),
}
LEVELS = ("plain", "polite", "formal", "casual")
_PAST = {"plain": "다", "polite": "어요", "formal": "습니다", "casual": "어"}
_FUTURE = {"plain": " 것이다", "polite": " 거예요", "formal": " 것입니다", "casual": " 거야"}
_WISH = {"plain": "고 싶다", "polite": "고 싶어요", "formal": "고 싶습니다", "casual": "고 싶어"}
_COPULA = {
    "plain": ("이다", "다"),
    "polite": ("이에요", "예요"),
    "formal": ("입니다", "입니다"),
    "casual": ("이야", "야"),
}
_SINO = ("", "일", "이", "삼", "사", "오", "육", "칠", "팔", "구")
_NATIVE_ONES = ("", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉")
_NATIVE_TENS = ("", "열", "스물", "서른", "마흔", "쉰", "예순", "일흔", "여든", "아흔")


def final_of(word: str) -> str:
    """Return the final consonant of the last syllable (or digit) of `word`; a blank if it ends in a vowel.

    Raises:
        ValueError: the last character is neither Hangul nor a digit.
    """
    last = word[-1:]
    if last in _DIGIT_FINALS:
        return _DIGIT_FINALS[last]
    if not last or not _FIRST <= ord(last) <= _LAST:
        raise ValueError(f"hangul: word must end in a Hangul syllable or a digit, got {word!r}")
    return _FINALS[(ord(last) - _FIRST) % 28]


def with_final(word: str, final: str) -> str:
    """Return `word` with the final consonant of its last syllable replaced (a blank: removed)."""
    code = ord(word[-1]) - _FIRST
    return word[:-1] + chr(_FIRST + code - code % 28 + _FINALS.index(final))


def attach(word: str, particle: str) -> str:
    """Return `word` with the right form of `particle`, which is named by its form after a consonant: 나무는, 서울로."""
    final = final_of(word)
    if particle == "으로":
        return word + ("로" if final in " ㄹ" else "으로")
    if particle not in _PARTICLES:
        raise ValueError(f"hangul: particle must be among 으로 {' '.join(_PARTICLES)}, got {particle!r}")
    return word + _PARTICLES[particle][final == " "]


def copula(word: str, level: str) -> str:
    """Return `word` with 이다 in the given speech level: 학생이에요, 친구예요."""
    return word + _COPULA[level][final_of(word) == " "]


@dataclass(frozen=True)
class Predicate:
    """A verb or adjective: 듣다 = Predicate("듣", "들어", "들으")."""

    stem: str  # 듣-, before endings in a consonant
    infinitive: str  # 들어, the form in 아/어
    open_stem: str  # 들으-, before endings in 으
    adjective: bool = False

    @classmethod
    def parse(cls, line: str) -> "Predicate":
        """Parse a line such as `듣다 v 들어 들으`; the last word may be left out if it is regular."""
        base, kind, infinitive, *rest = line.split()
        stem = base.removesuffix("다")
        regular = stem if final_of(stem) in " ㄹ" else stem + "으"
        return cls(stem, infinitive, rest[0] if rest else regular, kind == "a")

    def form(self, name: str, level: str) -> str:
        """Return the form `name` (과거, 현재, 미래, 희망, 고, 서, 면, 지만, 는, 은, 을, 기) in a speech level.

        Raises:
            ValueError: there is no such form.
        """
        short = with_final(self.stem, " ") if final_of(self.stem) == "ㄹ" else self.stem
        past = with_final(self.infinitive, "ㅆ")
        adnominal = with_final(self.open_stem, "ㄴ")
        forms = {
            "과거": past + _PAST[level],
            "미래": with_final(self.open_stem, "ㄹ") + _FUTURE[level],
            "희망": self.stem + _WISH[level],
            "고": self.stem + "고",
            "기": self.stem + "기",
            "서": self.infinitive + "서",
            "면": self.open_stem + "면",
            "지만": self.stem + "지만",
            "는": adnominal if self.adjective and not self.stem.endswith(("있", "없")) else short + "는",
            "은": adnominal,
            "을": with_final(self.open_stem, "ㄹ"),
        }
        if name == "현재":
            return self._present(short, level)
        if name not in forms:
            raise ValueError(f"hangul: form must be among 현재 {' '.join(forms)}, got {name!r}")
        return forms[name]

    def _present(self, short: str, level: str) -> str:
        vowel = final_of(short) == " "
        if level == "formal":
            return with_final(short, "ㅂ") + "니다" if vowel else self.stem + "습니다"
        if level == "plain":
            if self.adjective:
                return self.stem + "다"
            return with_final(short, "ㄴ") + "다" if vowel else self.stem + "는다"
        return self.infinitive + ("요" if level == "polite" else "")


def sino(number: int) -> str:
    """Return `number` (0 to 99,999,999) in Sino-Korean words: 12,345 is 만 이천삼백사십오.

    Raises:
        ValueError: `number` is out of range.
    """
    if not 0 <= number < 10**8:
        raise ValueError(f"hangul: number must be 0 to 99999999, got {number}")
    if number == 0:
        return "영"
    high, low = divmod(number, 10_000)
    parts = []
    if high:
        parts.append(("" if high == 1 else _below_myriad(high)) + "만")
    if low:
        parts.append(_below_myriad(low))
    return " ".join(parts)


def _below_myriad(number: int) -> str:
    words = ""
    for unit, name in ((1000, "천"), (100, "백"), (10, "십"), (1, "")):
        digit = number // unit % 10
        if digit:
            words += ("" if digit == 1 and name else _SINO[digit]) + name
    return words


def native(number: int) -> str:
    """Return `number` (1 to 99) in native words, in the form before a counter: 한, 열두, 스무, 스물한.

    Raises:
        ValueError: `number` is out of range.
    """
    if not 1 <= number <= 99:
        raise ValueError(f"hangul: number must be 1 to 99, got {number}")
    if number == 20:
        return "스무"
    return _NATIVE_TENS[number // 10] + _NATIVE_ONES[number % 10]
