"""The embedded corpus: the same every time, correct Korean word forms, right sums."""

import re
import unicodedata

import pytest

from yaongi.data.sources.embedded import corpus
from yaongi.data.sources.embedded.hangul import LEVELS, Predicate, attach, copula, native, sino
from yaongi.data.sources.embedded.korean import korean_documents, predicates, prose, template_count, templates, words


def test_what_is_shipped_and_generated_is_the_published_corpus() -> None:
    assert corpus.shipped_hash() == corpus.SHIPPED_SHA256


def test_splits_hold_everything_once() -> None:
    sources = {(s.domain, s.split): list(s.documents()) for s in corpus.embedded_sources()}
    assert set(sources) == {(domain, split) for domain in ("ko", "en", "code", "math") for split in ("train", "val")}
    assert len(sources["ko", "train"]) + len(sources["ko", "val"]) == len(list(corpus.korean()))
    assert not set(sources["ko", "train"]) & set(sources["ko", "val"])
    for (_, split), documents in sources.items():
        size = sum(len(text.encode()) for text in documents)
        assert size > (1_000_000 if split == "train" else 40_000)


def test_prose_is_there() -> None:
    pieces = list(prose())
    assert sum(len(piece.encode()) for piece in pieces) >= 60_000
    assert len(set(pieces)) == len(pieces) >= 30
    paragraphs = [line for piece in pieces for line in piece.splitlines() if len(line) > 40]
    assert len(set(paragraphs)) == len(paragraphs), "nothing is said twice"
    for piece in pieces:
        assert piece == unicodedata.normalize("NFC", piece)


def test_templates_are_many_and_all_can_be_filled() -> None:
    assert template_count() >= 400
    for sections in templates().values():
        for section in ("여는 말", "가운데", "맺는 말"):
            for template in sections[section]:
                for name in re.findall(r"\{([^{}:]+)", template):
                    assert name.rstrip("23") in words() or name in (
                        "native",
                        "sino",
                        "digit",
                        "나는",
                        "내가",
                        "내",
                        "나에게",
                    )
                for name in re.findall(r"<([^<>:]+):", template):
                    assert name in predicates()
    for text in korean_documents(1, 2000):
        assert not re.search(r"[{}<>]", text)


@pytest.mark.parametrize(
    ("word", "particle", "wanted"),
    [
        ("물", "은", "물은"),
        ("나무", "은", "나무는"),
        ("책", "이", "책이"),
        ("사과", "이", "사과가"),
        ("밥", "을", "밥을"),
        ("우유", "을", "우유를"),
        ("집", "과", "집과"),
        ("학교", "과", "학교와"),
        ("부산", "으로", "부산으로"),
        ("서울", "으로", "서울로"),
        ("제주", "으로", "제주로"),
        ("지영", "아", "지영아"),
        ("민수", "아", "민수야"),
        ("3", "을", "3을"),
        ("42", "을", "42를"),
        ("7", "으로", "7로"),
        ("10", "은", "10은"),
    ],
)
def test_particles_follow_the_final_consonant(word: str, particle: str, wanted: str) -> None:
    assert attach(word, particle) == wanted


def test_words_that_take_no_particle() -> None:
    with pytest.raises(ValueError, match="Hangul"):
        attach("abc", "은")
    with pytest.raises(ValueError, match="particle"):
        attach("물", "엔")


@pytest.mark.parametrize(
    ("line", "forms"),
    [
        ("먹다 v 먹어", "먹는다 먹어요 먹습니다 먹어 먹었습니다 먹으면 먹을"),
        ("가다 v 가", "간다 가요 갑니다 가 갔습니다 가면 갈"),
        ("만들다 v 만들어", "만든다 만들어요 만듭니다 만들어 만들었습니다 만들면 만들"),
        ("듣다 v 들어 들으", "듣는다 들어요 듣습니다 들어 들었습니다 들으면 들을"),
        ("덥다 a 더워 더우", "덥다 더워요 덥습니다 더워 더웠습니다 더우면 더울"),
        ("모르다 v 몰라", "모른다 몰라요 모릅니다 몰라 몰랐습니다 모르면 모를"),
        ("좋다 a 좋아", "좋다 좋아요 좋습니다 좋아 좋았습니다 좋으면 좋을"),
        ("하다 v 해", "한다 해요 합니다 해 했습니다 하면 할"),
    ],
)
def test_conjugation(line: str, forms: str) -> None:
    predicate = Predicate.parse(line)
    present = [predicate.form("현재", level) for level in LEVELS]
    assert [
        *present,
        predicate.form("과거", "formal"),
        predicate.form("면", "plain"),
        predicate.form("을", "plain"),
    ] == (forms.split())


def test_copula_and_numbers() -> None:
    assert [copula("학생", level) for level in LEVELS] == ["학생이다", "학생이에요", "학생입니다", "학생이야"]
    assert [copula("친구", level) for level in LEVELS] == ["친구다", "친구예요", "친구입니다", "친구야"]
    assert [native(n) for n in (1, 2, 3, 4, 12, 20, 21, 99)] == [
        "한",
        "두",
        "세",
        "네",
        "열두",
        "스무",
        "스물한",
        "아흔아홉",
    ]
    assert [sino(n) for n in (0, 10, 11, 110, 2024, 10_000, 12_345, 300_000)] == [
        *("영", "십", "십일", "백십", "이천이십사", "만", "만 이천삼백사십오", "삼십만"),
    ]
    with pytest.raises(ValueError, match="1 to 99"):
        native(0)
    with pytest.raises(ValueError, match="0 to 99999999"):
        sino(10**8)


def test_every_sum_is_right() -> None:
    sides = r"[\d(](?:[\d ()+×÷/-]*[\d)])?"
    equations = 0
    for text in corpus.mathematics():
        plain = re.sub(r".*\d[xs] .*", "", text)  # without lines that contain an unknown
        for chain in re.findall(rf"(?<![\w.])({sides}(?: = {sides})+)", plain):
            # By the pattern above a side consists only of digits, signs and brackets.
            values = [eval(side.replace("×", "*").replace("÷", "/")) for side in chain.split(" = ")]
            assert max(values) - min(values) < 1e-9, chain
            equations += 1
    assert equations > 9_000
