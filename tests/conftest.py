"""Set-up of every test: uninitialised memory is poisoned, and tests that this process can't run are skipped."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
torch.set_num_threads(1)  # the tests' tensors are small: with a second, busy core they would take five times as long


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, tests that this process can't run."""
    for item in items:
        if item.get_closest_marker("gpu") and not ON_HOPPER:
            item.add_marker(pytest.mark.skip(reason="needs an H100 (compute capability 9.0)"))
        if item.get_closest_marker("interpret") and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised memory (torch.empty and the like) with NaN, so that an unwritten element is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Seed torch, so that a test draws the same random numbers every time."""
    torch.manual_seed(0)
