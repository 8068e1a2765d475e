"""Rules of every benchmark: check results first, flush L2, interleave peers, compare with the chip's ceilings.

`pytest benchmarks/ --benchmark-only` prints a table at its end; `--benchmark-json out.json` keeps every figure in
`extra_info`. Times are medians of CUDA events around one call, with L2 flushed before each. The candidates of a case
run in turn, so that all see the same clock rates.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import Absent, Compare, Peer, Work, figures, interleaved_ms, line_of, machine

from yaongi.kernels import backend

REASON = "benchmarks need an H100 (compute capability 9.0); none is visible to torch"
_ROWS: pytest.StashKey[list[tuple[str, dict[str, Any]]]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    """Start the session's table."""
    config.stash[_ROWS] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip every benchmark, with the reason, if there is no H100."""
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table."""
    if config.stash[_ROWS]:
        terminalreporter.section(f"yaongi on {torch.cuda.get_device_name()}, torch {torch.__version__}")
        for name, info in config.stash[_ROWS]:
            terminalreporter.write_line(line_of(name, info))


@pytest.fixture(scope="session")
def l2_flush() -> Callable[[], Any]:
    """Overwrite more than L2 holds, which also gives the host time to enqueue the measured call."""
    buffer = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")

    def flush() -> None:  # returns None: pytest-benchmark would pass a setup's result as arguments
        buffer.zero_()

    return flush


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    """Reset torch.compile, which would compile for dynamic shapes when it sees a second shape."""
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def built() -> None:
    """Refuse to measure fallbacks: the CUDA library must be built."""
    reason = backend.unavailable("cuda")
    if reason:
        pytest.fail(f"the CUDA kernels can't run: {reason}")


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, l2_flush: Callable[[], Any]) -> Compare:
    """Return `compare(ours, work, peers, notes)`, which times all in turn and returns milliseconds by name.

    Notes are added to the row; they may be a function of the times.
    """

    def run(
        ours: Callable[[], Any],
        work: Work,
        peers: dict[str, Peer],
        notes: dict[str, str] | Callable[[dict[str, float]], dict[str, str]] | None = None,
    ) -> dict[str, float]:
        present = {name: peer for name, peer in peers.items() if not isinstance(peer, Absent)}
        times = interleaved_ms({"yaongi": ours, **present}, l2_flush)
        benchmark.pedantic(ours, setup=l2_flush, rounds=5, iterations=1)
        info = figures(times, work)
        info |= {name: f"absent: {peer.reason}" for name, peer in peers.items() if isinstance(peer, Absent)}
        info |= notes(times) if callable(notes) else notes or {}
        info |= machine()
        benchmark.extra_info.update(info)
        request.config.stash[_ROWS].append((request.node.name.removeprefix("test_"), info))
        return times

    return run
