"""The mixture and the shuffle: exact, and functions of only the sample number."""

import numpy as np
import pytest

from yaongi.data.mix import PLAN, Mixture, integer_shares, parse_mix
from yaongi.data.permute import permute

MIXES = [
    PLAN,
    {"ko": 1},
    {"ko": 1, "en": 1},
    {"ko": 0.97, "en": 0.01, "code": 0.01, "math": 0.01},
    {"ko": 94098612, "en": 46975465, "code": 58826544, "math": 35300185},
    {"ko": 1 / 3, "en": 1 / 7, "code": 0.5, "math": 1e-3},
]


@pytest.mark.parametrize("mix", MIXES)
def test_any_prefix_holds_the_ratios_within_one_row(mix: dict[str, float]) -> None:
    mixture = Mixture(mix)
    samples = 25_000
    domains, places = mixture.locate(np.arange(samples))
    shares = np.array(list(mixture.shares.values())) / sum(mixture.shares.values())
    counts = (domains[:, None] == np.arange(len(shares))).cumsum(0)
    error = np.abs(counts - shares * np.arange(1, samples + 1)[:, None])
    assert error.max() < 1
    for domain in range(len(shares)):
        assert (places[domains == domain] == np.arange(counts[-1, domain])).all()
    for prefix in (0, 1, 17, samples):
        assert list(mixture.counts(prefix).values()) == (counts[prefix - 1].tolist() if prefix else [0] * len(shares))


def test_shares_are_exact_where_they_can_be() -> None:
    assert integer_shares(PLAN) == {"ko": 8, "en": 4, "code": 5, "math": 3}
    assert integer_shares({"ko": 0.1, "en": 0.2}) == {"ko": 1, "en": 2}
    assert sum(integer_shares({"ko": 1 / 3, "en": 1 / 7}).values()) == 10_000


@pytest.mark.parametrize("text", ["ko", "ko=x", "=1", "a/b=1", "ko=0", "ko=-1", "ko=nan"])
def test_bad_mixes(text: str) -> None:
    with pytest.raises(ValueError, match="mix: "):
        parse_mix(text)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    places = np.arange(size)
    rows = permute(places, size, "0/ko/0")
    assert sorted(rows.tolist()) == places.tolist()
    assert [int(permute(np.array([place]), size, "0/ko/0")[0]) for place in range(min(size, 20))] == rows[:20].tolist()
    if size > 100:
        assert (rows != permute(places, size, "0/ko/1")).mean() > 0.9
        assert abs(float(np.corrcoef(rows, places)[0, 1])) < 0.1


def test_permute_keeps_its_order_for_ever() -> None:
    assert permute(np.arange(8), 1000, "0/ko/0").tolist() == ORDER


ORDER = [883, 35, 662, 167, 580, 675, 916, 319]


def test_permute_refuses_places_outside() -> None:
    with pytest.raises(ValueError, match="0 to 4"):
        permute(np.array([5]), 5, "k")
