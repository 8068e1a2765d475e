"""Near duplicates: how many are found by similarity, and how much memory it takes to remember what was seen."""

import numpy as np
import psutil
import pytest
from texts import random_texts

from yaongi.data.filters.dedup import SHINGLE_WORDS, Seen, band_keys, curve, exact_key, found
from yaongi.data.filters.fingerprints import Fingerprints
from yaongi.data.text import word_hashes


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def pairs(changed: int, count: int) -> tuple[list[tuple[str, str]], float]:
    """Return pairs of texts of 400 words that differ in `changed` of them, and the pairs' mean Jaccard similarity."""
    made, similarity = [], 0.0
    for number, text in enumerate(random_texts(7, count, words=400)):
        words = text.split()
        for place in range(changed):
            words[5 + place * 390 // changed] = f"x{number}"
        made.append((text, " ".join(words)))
        one, other = map(shingles, made[-1])
        similarity += len(one & other) / len(one | other) / count
    return made, similarity


def keys(text: str) -> list[int]:
    return [exact_key(text), *band_keys(word_hashes(text))]


def share_found(changed: int) -> tuple[float, float]:
    """Return the share of near duplicates found among 1,000 pairs, and their similarity."""
    made, similarity = pairs(changed, 1000)
    seen = Seen()
    assert seen.kinds([keys(one) for one, _ in made]) == [None] * 1000
    return seen.kinds([keys(other) for _, other in made]).count("near") / 1000, similarity


def test_95_percent_are_found_at_a_similarity_of_0_8() -> None:
    share, similarity = share_found(9)
    assert similarity == pytest.approx(0.8, abs=0.01)
    assert share >= 0.95
    share, similarity = share_found(26)
    assert similarity == pytest.approx(0.5, abs=0.02)
    assert share <= 0.12, "half of the text differs: mostly kept"


def test_the_curve_is_what_is_measured() -> None:
    assert found(0.8) > 0.95
    assert curve() == "6.8% at 0.5, 26.3% at 0.6, 65.7% at 0.7, 96.3% at 0.8, 100.0% at 0.9"
    for changed in (5, 14, 26):
        share, similarity = share_found(changed)
        assert share == pytest.approx(found(similarity), abs=0.03)


def test_memory_is_bounded_and_the_oldest_go() -> None:
    """Three times as many keys as there is room for: the newest are known, the oldest not, in no more memory."""
    most = 1 << 25
    known = Fingerprints(most)
    keys = np.random.default_rng(0).integers(0, 2**64, 3 * most // 4, dtype=np.uint64)
    for part in np.array_split(keys, 50):
        known.add(part)
        assert known.bytes <= most
    assert known.forgets
    assert known.has(keys[-most // 16 :]).all()
    assert not known.has(keys[: most // 16]).any()


@pytest.mark.parametrize("together", [True, False])
def test_the_first_is_kept_and_equal_texts_are_exact(together: bool) -> None:
    """Whether they come in one call or in several."""
    one, other = random_texts(1, 2)
    near = [exact_key(other), *band_keys(word_hashes(one))]
    documents = [keys(one), keys(f" {one}\n"), near, near, keys("하나 둘"), keys("하나 둘")]
    seen = Seen()
    kinds = seen.kinds(documents) if together else [kind for document in documents for kind in seen.kinds([document])]
    assert kinds == [None, "exact", "near", "exact", None, "exact"]
    assert keys("하나 둘")[1:] == []


def test_fingerprints_are_a_set() -> None:
    """Over several tables, with equal keys, and with keys that begin at one place."""
    rng = np.random.default_rng(0)
    known, added = Fingerprints(1 << 30), []
    for number in range(6):
        new = rng.integers(0, 1 << 64, 500_000, np.uint64)
        new[:1000] = new[1000:2000]
        new[2000:2200] = new[2000:2200] & ~np.uint64(0xFFFFFFFF) | np.uint64(0xFFFFFFFF - number)
        known.add(new)
        added.append(new)
    assert len(known._tables) == 2
    assert known.has(np.concatenate(added)).all()
    assert known.has(rng.integers(0, 1 << 64, 2_000_000, np.uint64)).sum() <= 2
    assert known.has(np.empty(0, np.uint64)).tolist() == []


def remember(documents: int) -> tuple[float, int]:
    """Return the bytes that a document takes, and how many of these, all new, were taken for seen ones."""
    rng = np.random.default_rng(1)
    before = psutil.Process().memory_info().rss
    seen, wrong = Seen(), 0
    for _ in range(documents // 500):
        wrong += 500 - seen.kinds(rng.integers(0, 1 << 64, (500, 19), np.uint64).tolist()).count(None)
    return (psutil.Process().memory_info().rss - before) / documents, wrong


def test_memory_is_bounded() -> None:
    size, wrong = remember(150_000)
    assert size < 300, "2,000 with datasketch"
    assert wrong == 0


@pytest.mark.long
def test_memory_of_two_million_documents() -> None:
    size, wrong = remember(2_000_000)
    assert size < 250
    assert wrong <= 5
