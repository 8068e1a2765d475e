"""How every command ends: a user's mistake is one line on standard error, never a traceback; numbers such as 15B."""

import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal

_UNITS = {"k": 3, "M": 6, "B": 9, "T": 12}
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


def with_digits(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return a command line with the values of `options` in digits where they have a unit: 15B, 1.5M, 4k."""

    def digits(text: str) -> str:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMBT])", text)
        return f"{Decimal(match[1]).scaleb(_UNITS[match[2]]):f}" if match else text

    written: list[str] = []
    is_value = False
    for argument in arguments:
        option, separator, value = argument.partition("=")
        named = option.replace("_", "-") in options
        written.append(
            f"{option}={digits(value)}" if named and separator else digits(argument) if is_value else argument
        )
        is_value = named and not separator
    return written


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks; of an OSError without a file name, only the system's text."""
    words = error.strerror if isinstance(error, OSError) and not error.filename else None
    return " ".join((words or str(error)).split())
