"""Trying again when a connection to the hub breaks, and giving up on what can't be had."""

import time
from collections.abc import Callable
from typing import TypeVar

TRIES = 6
T = TypeVar("T")


class Patience:
    """Tries of one data set: twice as long between them each time, up to a minute."""

    def __init__(
        self, name: str, say: Callable[[str], None] = print, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._name, self._say, self._sleep = name, say, sleep

    def __call__(self, action: Callable[[], T]) -> T:
        """Return what `action` returns, after several tries if need be. Raises as `wait` does."""
        failures = 0
        while True:
            try:
                return action()
            except network_errors() as error:
                failures += 1
                self.wait(failures, error)

    def wait(self, failures: int, error: Exception) -> None:
        """Sleep before the next try. Raises OSError after `TRIES` failures or a permanent error."""
        if isinstance(error, _hopeless_errors()):
            raise FileNotFoundError(f"download: {self._name} is not to be had: {error}") from error
        if failures >= TRIES:
            kind = type(error).__name__
            raise ConnectionError(f"download: {self._name} not reached in {TRIES} tries: {kind} {error}") from error
        seconds = min(60.0, 2.0**failures)
        self._say(f"{self._name}: {type(error).__name__}, trying again in {seconds:.0f} s")
        self._sleep(seconds)


def network_errors() -> tuple[type[Exception], ...]:
    """Return the errors worth another try; `HTTPError` is the base of all errors of the hub's HTTP client."""
    from huggingface_hub.errors import HTTPError

    return OSError, HTTPError


def unavailable_errors() -> tuple[type[Exception], ...]:
    """Return the errors of what can't be reached or isn't what it should be."""
    return *network_errors(), ValueError


def _hopeless_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    return FileNotFoundError, PermissionError, EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
