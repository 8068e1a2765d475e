"""English and code from every Python installation: the language reference in `pydoc_data.topics`, docstrings, sources.

This package ships none of it: it is read from the installed Python, so it differs by version.
"""

import ast
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from yaongi.data.text import pieces

_CODE_BYTES = 2_000_000
_ENGLISH_BYTES = 1_500_000
_PIECE_CHARACTERS = 8_000
_SHORTEST_DOCSTRING = 300


def english_documents() -> Iterator[str]:
    """Yield the topics of the language reference, then docstrings of a paragraph or more."""
    from pydoc_data.topics import topics

    docstrings = chain.from_iterable(_docstrings(path) for path in _modules())
    yield from _up_to(chain((topics[name] for name in sorted(topics)), docstrings), _ENGLISH_BYTES)


def code_documents() -> Iterator[str]:
    """Yield sources of the standard library, cut at line ends into documents of about 8,000 characters."""
    yield from _up_to(
        chain.from_iterable(
            pieces(path.read_text("utf-8").splitlines(keepends=True), _PIECE_CHARACTERS) for path in _modules()
        ),
        _CODE_BYTES,
    )


def _modules() -> list[Path]:
    """Return the files of standard library modules and of some packages, without generated and empty ones."""
    root = Path(sysconfig.get_path("stdlib"))
    packages = ("asyncio", "collections", "concurrent", "email", "http", "importlib", "json", "logging", "xml")
    found = [*root.glob("*.py"), *chain.from_iterable((root / name).rglob("*.py") for name in packages)]
    return sorted(path for path in found if path.stat().st_size and not path.name.startswith(("_sysconfigdata", "_py")))


def _docstrings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST_DOCSTRING:
                yield text + "\n"


def _up_to(documents: Iterator[str], limit: int) -> Iterator[str]:
    total = 0
    for text in documents:
        yield text
        total += len(text.encode())
        if total >= limit:
            return
