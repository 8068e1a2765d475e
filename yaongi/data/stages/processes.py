"""Work on batches in several processes, with the results in order."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_worker: Callable[[Any], Any] | None = None


def _start_worker(worker: Callable[[Any], Any]) -> None:
    global _worker
    _worker = worker


def _run_worker(batch: Any) -> Any:
    if _worker is None:
        raise RuntimeError("pipeline: worker process was not started")
    return _worker(batch)


@contextmanager
def _killed(stage: str) -> Iterator[None]:
    """Tell of a worker process that was killed."""
    try:
        yield
    except BrokenProcessPool as error:
        ended = "a worker process was killed, perhaps for lack of memory"
        raise ChildProcessError(f"{stage}: {ended}; run again, with fewer --workers") from error


@contextmanager
def worker_pool(worker: Callable[[T], R], workers: int, stage: str) -> Iterator[Callable[[Iterable[T]], Iterator[R]]]:
    """Give a function from batches to the worker's results, in order, computed on `workers` processes.

    Args:
        worker: must be possible to pickle if there are several processes.
        stage: the command's name, for its error.
    """
    if workers == 1:
        yield lambda batches: map(worker, batches)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (worker,)) as pool, _killed(stage):

        def ordered(batches: Iterable[T]) -> Iterator[R]:
            running: deque[Future[R]] = deque()
            for batch in batches:
                running.append(pool.submit(_run_worker, batch))
                if len(running) > 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

        yield ordered
