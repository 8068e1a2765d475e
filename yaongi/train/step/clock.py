"""How long the device works on a block, without waiting for it."""

import time
from typing import Any

import torch


class Clock:
    """A context; after it, when the device has finished, `last` returns its seconds."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: tuple[Any, Any] | None = None
        self._began: Any = None

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *_: object) -> None:
        self._marks = self._began, self._now()

    def last(self) -> float:
        """Return the seconds of the last block, 0 if there was none; on a GPU only after a synchronisation."""
        if self._marks is None:
            return 0.0
        start, end = self._marks
        return start.elapsed_time(end) / 1e3 if self._cuda else end - start

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
