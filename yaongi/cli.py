"""How every command ends: a user's mistake is one line on standard error, never a traceback; numbers such as 15B."""

import contextlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_UNITS = {"k": 3, "M": 6, "B": 9, "T": 12}
USER_ERRORS = (ValueError, TypeError, OSError, MemoryError)
EXTRAS = {  # optional packages, and the extra of setup.py that brings each
    "datasets": "data",
    "huggingface_hub": "data",
    "pyarrow": "data",
    "rensa": "data",
    "zstandard": "data",
    "tensorboard": "log",
    "lm_eval": "eval",
    "gguf": "gguf",
    "starlette": "serve",
    "uvicorn": "serve",
}


def run(command: Callable[[], int | None], *, interrupted: str = "interrupted") -> None:
    """Run a command, and exit with the status that it returns if that is not 0.

    A user's mistake, or an optional package that is missing, ends the program with `error: …` on standard error and
    status 1; Ctrl-C with status 130.
    """
    try:
        status = command()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(f"error: {_missing(package)}", file=sys.stderr)
        raise SystemExit(1) from None
    except USER_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise SystemExit(130) from None
    if status:
        raise SystemExit(status)


def parsed(parse: Callable[[Sequence[str]], T]) -> T:
    """Return what `parse` makes of the command line; of the processes of one machine only the first says what is wrong.

    A command calls it before slow imports.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return parse(sys.argv[1:])
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            return parse(sys.argv[1:])
        except USER_ERRORS:
            raise SystemExit(1) from None


def require(package: str) -> None:
    """Raise ValueError if an optional package is not installed: before work that would need it later."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(_missing(package))


def _missing(package: str) -> str:
    return f"{package} must be installed (pip install 'yaongi[{EXTRAS[package]}]'), got none"


def words_for(module: str) -> list[str]:
    """Return how to start a module the way this program was started: `yaongi train` or `python3 -m yaongi.train`."""
    python, *rest = sys.orig_argv
    if rest and Path(rest[0]).name == "yaongi":
        return ["yaongi" if shutil.which("yaongi") == rest[0] else rest[0], module.removeprefix("yaongi.")]
    return [python, "-m", module]


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
