"""Korean documents from templates: a seeded grammar that keeps one cast, place, season and speech level per document.

Each file of `templates/*.txt` is a kind of document, in sections with one sentence per line: `[여는 말]`, `[가운데]`,
`[맺는 말]`, and before them `[말투]` with the speech levels that suit it, if not all do. A sentence may contain

* `{사람:은}`: a word of `words.txt` with the right form of a particle, or with the copula (`{사람:이다}`);
  `{장소2}` is another place than `{장소}`;
* `{native:2-9}`, `{sino:10-60}`, `{digit:10-99}`: a number in native or Sino-Korean words, or in figures;
* `<먹다:과거>`: a predicate of `predicates.txt` in the document's speech level;
* `{나는}`, `{내가}`, `{내}`, `{나에게}`: the speaker, humble in the polite levels.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from yaongi.data.sources.embedded.hangul import LEVELS, Predicate, attach, copula, native, sino

_SLOT = re.compile(r"\{([^{}:]+)(?::([^{}]+))?\}|<([^<>:]+):([^<>]+)>")
_NUMBERS: dict[str, Callable[[int], str]] = {"native": native, "sino": sino, "digit": str}
_SPEAKER = {"나는": "저는", "내가": "제가", "내": "제", "나에게": "저에게"}
SECTIONS = ("여는 말", "가운데", "맺는 말")
LEVEL_SECTION = "말투"


def korean_documents(seed: int, count: int) -> Iterator[str]:
    """Yield `count` documents; document `i` depends only on `seed` and `i`."""
    kinds = sorted(templates())
    for number in range(count):
        rng = random.Random(f"ko/{seed}/{number}")
        yield _document(rng, kinds[number % len(kinds)])


def template_count() -> int:
    """Return the number of sentence templates."""
    return sum(len(sections[name]) for sections in templates().values() for name in SECTIONS)


@cache
def templates() -> dict[str, dict[str, tuple[str, ...]]]:
    """Read the templates: kind of document, then section, then sentences.

    Raises:
        ValueError: a file lacks a section.
    """
    found = {}
    for name, text in _texts("templates"):
        sections = _sections(text)
        if tuple(sections)[-3:] != SECTIONS:
            raise ValueError(f"korean: {name} must have the sections {SECTIONS}, got {tuple(sections)}")
        found[name.removesuffix(".txt")] = sections
    return found


@cache
def words() -> dict[str, tuple[str, ...]]:
    """Read the word lists by name."""
    sections = _sections(files("yaongi.data.sources.embedded").joinpath("words.txt").read_text("utf-8"))
    return {name: tuple(word.strip() for line in lines for word in line.split(",")) for name, lines in sections.items()}


@cache
def nouns() -> tuple[str, ...]:
    """Read the common nouns, which no template needs: thousands, so that they have many different tokens."""
    text = files("yaongi.data.sources.embedded").joinpath("nouns.txt").read_text("utf-8")
    return tuple(re.findall("[가-힣]+", text))


@cache
def predicates() -> dict[str, Predicate]:
    """Read the verbs and adjectives by dictionary form."""
    lines = files("yaongi.data.sources.embedded").joinpath("predicates.txt").read_text("utf-8").splitlines()
    return {line.split()[0]: Predicate.parse(line) for line in lines if line.strip()}


@dataclass
class _Scene:
    """The choices that stay the same within a document."""

    rng: random.Random
    level: str
    chosen: dict[str, str] = field(default_factory=dict)

    def fill(self, template: str) -> str:
        return _SLOT.sub(self._slot, template)

    def _slot(self, match: re.Match[str]) -> str:
        name, argument, predicate, form = match.groups()
        if predicate:
            return predicates()[predicate].form(form, self.level)
        if name in _SPEAKER:
            return name if self.level in ("plain", "casual") else _SPEAKER[name]
        if name in _NUMBERS:
            low, high = map(int, argument.split("-"))
            return _NUMBERS[name](self.rng.randint(low, high))
        word = self._word(name)
        if argument is None:
            return word
        return copula(word, self.level) if argument == "이다" else attach(word, argument)

    def _word(self, name: str) -> str:
        if name not in self.chosen:
            kind = name.rstrip("23")
            taken = {word for slot, word in self.chosen.items() if slot.rstrip("23") == kind}
            self.chosen[name] = self.rng.choice([word for word in words()[kind] if word not in taken])
        return self.chosen[name]


def _document(rng: random.Random, kind: str) -> str:
    levels = templates()[kind].get(LEVEL_SECTION, (" ".join(LEVELS),))[0].split()
    scene = _Scene(rng, rng.choice(levels))
    first, middle, last = (templates()[kind][section] for section in SECTIONS)
    count = min(len(middle), rng.randint(4, 9))
    lines = [rng.choice(first), *(middle[i] for i in sorted(rng.sample(range(len(middle)), count))), rng.choice(last)]
    sentences = [scene.fill(line) for line in lines]
    if sentences[0].startswith("“"):
        return "\n".join(sentences) + "\n"
    cut = rng.randint(2, len(sentences) - 1)
    return " ".join(sentences[:cut]) + "\n" + " ".join(sentences[cut:]) + "\n"


def _sections(text: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("[") and line.endswith("]"):
            current = found.setdefault(line[1:-1], [])
        else:
            current.append(line)
    return {name: tuple(lines) for name, lines in found.items()}


def _texts(folder: str) -> Iterator[tuple[str, str]]:
    for entry in sorted(files("yaongi.data.sources.embedded").joinpath(folder).iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".txt"):
            yield entry.name, entry.read_text("utf-8")


def prose() -> Iterator[str]:
    """Yield the prose written for this project; in each file a line `***` separates documents."""
    for _, text in _texts("prose"):
        for piece in text.split("\n***\n"):
            yield piece.strip() + "\n"
