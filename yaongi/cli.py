"""How every command ends: a user's mistake is one line on standard error, never a traceback."""

import sys
from collections.abc import Callable

USER_ERRORS = (ValueError, TypeError, OSError, MemoryError)


def run(command: Callable[[], int | None], *, interrupted: str = "interrupted") -> None:
    """Run a command, and exit with the status that it returns if that is not 0.

    A user's mistake ends the program with `error: …` on standard error and status 1; Ctrl-C with status 130.
    """
    try:
        status = command()
    except USER_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise SystemExit(130) from None
    if status:
        raise SystemExit(status)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks; of an OSError without a file name, only the system's text."""
    words = error.strerror if isinstance(error, OSError) and not error.filename else None
    return " ".join((words or str(error)).split())
