"""A function recorded once as a CUDA graph and replayed, so that the GPU doesn't wait for Python between kernels."""

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch


class GraphMemory:
    """Memory for the temporary tensors of several graphs, as much as the largest needs.

    They must run one after the other, and leave nothing in it. Record the largest first: others then fit into its
    pieces.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()  # the allocator keeps memory per stream
        self.pool = torch.cuda.graph_pool_handle()


class GraphedFunction:
    """A function of tensors that returns nothing; from the second call on, a call is one graph launch.

    Everything that the function reads besides its arguments, and everything that it changes, must keep its memory
    address, and the function must not synchronise with the GPU. Its temporary tensors keep their memory between calls.

    The first call runs as usual, so that kernels are compiled and libraries have their workspaces. The second call
    records the graph; memory that the first call left in the allocator's cache is released before.
    """

    def __init__(
        self, function: Callable[..., None], what: str, otherwise: str, memory: GraphMemory | None = None
    ) -> None:
        """Prepare to record.

        Args:
            what: what the function does, for the error that it can't be recorded.
            otherwise: how to do without, for the same error.
            memory: for temporary tensors; None for memory of its own.
        """
        self._function, self._what, self._otherwise = function, what, otherwise
        self._stream = torch.cuda.Stream() if memory is None else memory.stream
        self._pool = None if memory is None else memory.pool
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: torch.Tensor) -> None:
        """Run the function.

        Raises:
            ValueError: the inputs' shapes differ from the first call's, or the function can't be recorded.
        """
        if not self._inputs:
            self._inputs = tuple(given.clone() for given in inputs)
            self._run()
            return
        for own, given in zip(self._inputs, inputs, strict=True):
            if own.shape != given.shape:
                raise ValueError(
                    f"cuda_graph: inputs must be {tuple(own.shape)}, as recorded, got {tuple(given.shape)}"
                )
            own.copy_(given)
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def _run(self) -> None:
        """Run on the stream that records the graph, because autograd and the libraries keep state per stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._function(*self._inputs)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads load data and write checkpoints, and their CUDA calls are not captured.
            with (
                _no_collection(),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                self._function(*self._inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"cuda_graph: {self._what} must never wait for the GPU, to be recorded as a CUDA graph, got "
                f"{str(error).splitlines()[0]!r}: {self._otherwise}"
            ) from error
        return graph


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's cyclic garbage collector off within the block.

    Garbage may hold an older graph, and a graph that is destroyed while another is recorded spoils that one.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
