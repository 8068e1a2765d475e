"""The sampler: the distribution of its choice, its edges, its random numbers; and text that comes in pieces."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yaongi.model.sampling import Sampling, choose, penalise, row_uniforms
from yaongi.model.text_stream import TextStream

PROBABILITIES = [0.15, 0.5, 0.02, 0.25, 0.08]
FINITE = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False, width=32)
EVEN = 4096  # evenly spaced uniforms give shares that are exact to 1 / EVEN


def shares(logits: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Return how often each token is chosen over all of [0, 1)."""
    uniforms = (torch.arange(EVEN, dtype=torch.float64) + 0.5) / EVEN
    chosen = choose(logits.expand(EVEN, -1), Sampling(**{"temperature": 1.0} | settings), uniforms)
    return torch.bincount(chosen, minlength=len(logits)).double() / EVEN


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 5e-324}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-8}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e300}, [0.2, 0.2, 0.2, 0.2, 0.2]),
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, [0.0658, 0.7314, 0.0012, 0.1829, 0.0187]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3, 0]),
        ({"top_k": 5}, PROBABILITIES),
        ({"top_k": 99}, PROBABILITIES),
        ({"top_p": 1e-300}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.1}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.5}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.76}, [1 / 6, 5 / 9, 0, 5 / 18, 0]),
        ({"top_p": 1.0}, PROBABILITIES),
        ({"top_k": 3, "top_p": 0.6}, [0, 2 / 3, 0, 1 / 3, 0]),
        ({"temperature": 1e300, "top_k": 2}, [0, 0.5, 0, 0.5, 0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_distribution_of_the_choice(settings: dict[str, Any], expected: list[float], dtype: torch.dtype) -> None:
    found = shares(torch.tensor(PROBABILITIES, dtype=torch.float64).log().to(dtype), **settings)
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert (found - wanted).abs().max() < 2 / EVEN
    assert found[wanted == 0].sum() == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_of_equal_logits_exactly_k_or_the_fewest_that_reach_p(count: int) -> None:
    logits = torch.full((10,), 3.5)
    wanted = torch.tensor([1 / count] * count + [0.0] * (10 - count), dtype=torch.float64)
    for limits in ({"top_k": count}, {"top_p": count / 10}, {"top_p": count / 10, "temperature": 1e-5}):
        assert (shares(logits, **limits) - wanted).abs().max() < 2 / EVEN
    assert choose(logits[None], Sampling()).item() == 0


def test_masked_tokens_never_come() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0])
    for limits in ({}, {"temperature": 1e300}, {"top_k": 3}, {"top_p": 0.999}):
        assert shares(logits, **limits)[[0, 2]].sum() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_no_distribution_is_marked(value: float, temperature: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = value
    logits[2] = -torch.inf
    chosen = choose(logits, Sampling(temperature), torch.full((3,), 0.9, dtype=torch.float64))
    assert chosen.tolist() == [3 if temperature else 0, -1, -1]


@given(
    logits=st.lists(FINITE, min_size=1, max_size=9),
    temperature=st.floats(1e-300, 1e300),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(1e-300, 1),
    uniform=st.floats(0, 1, exclude_max=True, allow_subnormal=False),
)
@settings(deadline=None, max_examples=300)
def test_any_finite_logits_and_settings_give_a_token_among_the_k_likeliest(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None, uniform: float
) -> None:
    row = torch.tensor(logits)
    sampling = Sampling(temperature, top_k, top_p)
    chosen = int(choose(row[None], sampling, torch.tensor([uniform], dtype=torch.float64)))
    likelier = sum(value > logits[chosen] for value in row.tolist())
    assert likelier < (top_k or len(logits))


def test_the_random_numbers_of_a_row() -> None:
    first = row_uniforms(0, [5, 7], 0, 1000)
    assert (first[:10] == row_uniforms(0, [5, 7], 0, 10)).all()
    for other in ((1, [5, 7], 0), (0, [5, 8], 0), (0, [5], 0), (0, [57], 0), (0, [5, 7], 1), (-1, [5, 7], 0)):
        assert (first[:10] != row_uniforms(*other, 10)).any()
    assert first.min() >= 0
    assert first.max() < 1
    assert abs(first.mean() - 0.5) < 0.05


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    seen = torch.tensor([[True, True, True, False, False]])
    found = penalise(torch.tensor([[2.0, -2.0, 0.0, 2.0, -2.0]]), seen, 4.0)
    assert found.tolist() == [[0.5, -8.0, 0.0, 2.0, -2.0]]


def decode(tokens: Sequence[int]) -> str:
    """Decode tokens that are bytes, as SentencePiece decodes its byte pieces."""
    return bytes(tokens).decode(errors="replace")


def streamed(text: str, stop: Sequence[str]) -> tuple[list[str], bool]:
    """Return the pieces of a text that comes byte by byte, and whether it ended by itself."""
    stream = TextStream(decode, stop)
    pieces = [stream.push(byte) for byte in text.encode()]
    return [*pieces, stream.finish()], stream.ended


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("안녕 🐈!", (), "안녕 🐈!"),
        ("하나. 둘. 셋.", ("둘",), "하나. "),
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("one\n\ntwo", ("\n\n", "two"), "one"),
        ("xyz", ("yz", "y"), "x"),
        ("stop", ("stop",), ""),
        ("sto", ("stop",), "sto"),
    ],
)
def test_text_comes_in_whole_characters_and_ends_before_a_stop(text: str, stop: tuple[str, ...], wanted: str) -> None:
    pieces, ended = streamed(text, stop)
    assert "".join(pieces) == wanted
    assert ended == any(s in text for s in stop)
    assert "\ufffd" not in "".join(pieces)


def test_bytes_that_are_no_character_are_marked_at_the_end() -> None:
    stream = TextStream(decode)
    assert [stream.push(byte) for byte in "가".encode()[:2]] == ["", ""]
    assert "\ufffd" in stream.finish()


def test_the_first_stop_string_that_is_complete_ends_the_text() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab가", k=12))
        stop = ["".join(rng.choices("ab가", k=rng.randint(1, 4))) for _ in range(2)]
        begun = next((text[:n] for n in range(13) if any(s in text[:n] for s in stop)), None)
        places = [begun.find(s) for s in stop if s in begun] if begun else []
        assert "".join(streamed(text, stop)[0]) == text[: min(places, default=len(text))], (text, stop)
