"""A function recorded as a CUDA graph, whatever Python's garbage collector would do meanwhile."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch

from yaongi.model.layers.cuda_graph import GraphedFunction, GraphMemory

recording = False


class StandIn:
    """In place of a CUDA graph: it must not be destroyed while another is recorded."""

    destroyed: ClassVar[list[bool]] = []

    def __del__(self) -> None:
        self.destroyed.append(recording)

    def replay(self) -> None:
        """Do nothing."""


@contextlib.contextmanager
def capture(*_: Any, **__: Any) -> Iterator[None]:
    """In place of torch.cuda.graph."""
    global recording
    recording = True
    try:
        yield
    finally:
        recording = False


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """Let the collector run after so many allocations as `allocate` makes, but not after a few."""
    before = gc.get_threshold()
    gc.set_threshold(1000)
    yield
    gc.set_threshold(*before)


@pytest.fixture
def no_gpu() -> Iterator[None]:
    """Put stand-ins in the place of torch's functions for a GPU."""
    idle = mock.MagicMock()
    functions = {"Stream": idle, "current_stream": idle, "stream": idle, "graph": capture, "CUDAGraph": StandIn}
    StandIn.destroyed.clear()
    with mock.patch.multiple(torch.cuda, **functions):
        yield


def leave_in_a_cycle(graph: Any) -> None:
    """Drop a graph so that only the collector can find it."""
    cycle = [graph]
    cycle.append(cycle)


def allocate(*_: Any) -> list[list[int]]:
    """Give the collector occasions."""
    return [[n] for n in range(3000)]


def record(function: Any) -> GraphedFunction:
    """Return a function that is recorded."""
    graphed = GraphedFunction(function, "a step", "do without")
    x = torch.zeros(1)
    graphed(x)
    graphed(x)
    return graphed


@pytest.mark.usefixtures("no_gpu", "eager_collector")
def test_no_graph_is_destroyed_while_another_is_recorded() -> None:
    def run(*_: Any) -> None:
        if recording:
            leave_in_a_cycle(StandIn())
        allocate()

    record(run)
    gc.collect()
    assert StandIn.destroyed == [False, False]  # the one in the cycle, and the recorded one


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was_afterwards(enabled: bool) -> None:
    def fail(*_: Any) -> None:
        if recording:
            assert not gc.isenabled()
            raise RuntimeError("it waits")

    try:
        (gc.enable if enabled else gc.disable)()
        record(lambda *_: None)
        assert gc.isenabled() == enabled
        with pytest.raises(ValueError, match=r"^cuda_graph: a step must never wait for the GPU"):
            record(fail)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.usefixtures("eager_collector")
def test_an_older_graph_in_a_cycle_spoils_nothing() -> None:
    total, one = torch.zeros(1, device="cuda"), torch.ones(1, device="cuda")

    def add(x: torch.Tensor) -> None:
        allocate()
        total.add_(x)

    older, newer = (GraphedFunction(add, "a step", "do without") for _ in range(2))
    older(one)
    older(one)
    newer(one)
    gc.collect()
    leave_in_a_cycle(older)
    del older
    newer(one)
    newer(one)
    assert total.item() == 5


@pytest.mark.gpu
def test_graphs_share_memory() -> None:
    """Each gives what it gives alone, in any order, and a smaller one takes no memory of its own."""
    memory, total = GraphMemory(), torch.zeros(1, device="cuda")
    graphs, reserved = [], []
    for numbers in (2**24, 2**23, 2**22):

        def add(x: torch.Tensor, numbers: int = numbers) -> None:
            total.add_((x.repeat(numbers) + 1).sum() / numbers)

        graphs.append(GraphedFunction(add, "a sum", "do without", memory))
        for _ in range(2):
            graphs[-1](total.new_zeros(1))
        reserved.append(torch.cuda.memory_reserved())
    assert max(reserved) - reserved[0] < 2**23  # bytes; a graph's numbers take 2^24 or more
    for number in (1, 0, 2, 2, 1):
        graphs[number](total.new_full((1,), float(number)))
    assert total.item() == 2 * len(graphs) + (2 + 1 + 3 + 3 + 2)
