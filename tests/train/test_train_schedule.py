"""The rates of every step."""

from itertools import pairwise

import pytest

from yaongi.train.config import Training
from yaongi.train.schedule import MOST_BIAS_RATE, Schedule, bias_rate


def test_wsd() -> None:
    """Check the linear warm-up, the peak, and the linear decay to the final rate."""
    schedule = Schedule(1000, "wsd", warmup=0.01, decay=0.2, final=1e-5)
    rates = [schedule.lr(step, 0.02) for step in range(1000)]
    assert rates[0] == pytest.approx(0.002)
    assert rates[9:800] == [0.02] * 791
    assert rates[-1] == pytest.approx(1e-5)
    falls = [a - b for a, b in pairwise(rates[799:])]
    assert falls == pytest.approx([(0.02 - 1e-5) / 200] * 200)
    assert [schedule.phase(step) for step in (0, 9, 10, 799, 800, 999)] == ["warmup"] * 2 + ["stable"] * 2 + [
        "decay"
    ] * 2


def test_cosine() -> None:
    """Check that half way through the decay the rate is half way between peak and final."""
    schedule = Schedule(101, "cosine", warmup=0.0, final=0.0)
    assert schedule.lr(100, 1.0) == pytest.approx(0.0, abs=1e-12)
    assert schedule.lr(49, 1.0) == pytest.approx(0.5, abs=0.01)
    assert schedule.phase(0) == "decay"


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_runs_of_few_steps(steps: int, kind: str) -> None:
    """Check that nothing divides by zero, and that no rate exceeds the peak."""
    schedule = Schedule(steps, kind)  # type: ignore[arg-type]
    assert all(0 < schedule.lr(step, 0.02) <= 0.02 for step in range(steps))


def test_a_final_rate_above_the_peak_is_no_rise() -> None:
    """Check that a parameter group with a peak below `final_lr` ends at its own peak."""
    assert Schedule(10, final=1.0).lr(9, 0.02) == pytest.approx(0.02)


def test_messages() -> None:
    """Check the errors for shares that don't fit, a wrong kind and no steps."""
    with pytest.raises(ValueError, match=r"warmup \+ decay must be 0 to 1, got 0.5 \+ 0.6"):
        Schedule(10, warmup=0.5, decay=0.6)
    with pytest.raises(ValueError, match="kind must be wsd or cosine, got 'linear'"):
        Schedule(10, "linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        Schedule(0)


@pytest.mark.parametrize("steps", [1000, 14305])
def test_the_router_s_bias_travels_as_far_in_any_run(steps: int) -> None:
    """Its rate falls evenly to almost 0, and adds up to the travel; a short run doesn't take larger steps."""
    rates = [bias_rate(step, steps, 4.0) for step in range(steps)]
    assert sum(rates) == pytest.approx(4.0)
    falls = [a - b for a, b in pairwise([*rates, 0.0])]
    assert falls == pytest.approx([falls[0]] * steps)
    assert max(bias_rate(step, 12, 4.0) for step in range(12)) == MOST_BIAS_RATE


def test_the_router_s_bias_can_keep_one_rate() -> None:
    """Without a travel the rate stays; with one it follows the run's length."""
    one, long = Training(bias_travel=0.0, bias_rate=2e-3), Training(tokens=1e12, bias_rate=2e-3)
    assert {one.bias_rate_at(step) for step in (0, 7000, 14304)} == {2e-3}
    assert long.bias_rate_at(0) == pytest.approx(2 * 4.0 / long.steps, rel=1e-3)
