"""Dataclasses of settings: made from dicts, and checked field by field with error messages of one form."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal


def to_table(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a copy that TOML and JSON can hold: tuples become lists, and values that are None are left out."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items() if v is not None}


def from_table(kind: Any, fields: Any, what: str) -> Any:
    """Make an instance of the dataclass `kind` from a mapping.

    Args:
        what: first word of the error messages.

    Raises:
        ValueError: a key is unknown or missing; the message names it.
    """
    if isinstance(fields, kind):
        return fields
    if not isinstance(fields, Mapping):
        raise ValueError(f"{what}: must be a table, got {fields!r}")
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key in fields:
        if key not in known:
            raise ValueError(f"{what}: keys must be among {', '.join(known)}, got {key!r}")
    required = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields]
    if required:
        raise ValueError(f"{what}: {required[0]!r} must be given, got {', '.join(fields) or 'none'}")
    return kind(**{key: _fitted(value, known[key].type) for key, value in fields.items()})


def _fitted(value: Any, kind: Any) -> Any:
    """Convert a value of TOML or JSON to a field's type: a list to a tuple, an int to a float, a string to a path."""
    if isinstance(value, list):
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return Path(value) if kind in (Path, Path | None) and isinstance(value, str) else value


class FieldChecks:
    """Checks of a dataclass's fields, with error messages of one form."""

    def __init__(self, what: str) -> None:
        self.what = what

    def require(self, condition: bool, name: str, wanted: str, got: object) -> None:
        """Raise ValueError `what: name must be …, got …` if the condition doesn't hold."""
        if not condition:
            raise ValueError(f"{self.what}: {name} must be {wanted}, got {got}")

    def positive(self, value: Any, *names: str) -> None:
        """Check that these fields are 1 or more."""
        for name in names:
            self.require(getattr(value, name) >= 1, name, "1 or more", getattr(value, name))

    def types(self, value: Any) -> None:
        """Check that every field has its annotated type; an int is accepted for a float."""
        for field in dataclasses.fields(value):
            got = getattr(value, field.name)
            self.require(_is_instance(got, field.type), field.name, _name_of(field.type), repr(got))


def _is_instance(value: object, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if origin is types.UnionType:
        return any(_is_instance(value, k) for k in typing.get_args(kind))
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_instance(v, typing.get_args(kind)[0]) for v in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _name_of(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return f"of type {kind.__name__}" if isinstance(kind, type) else f"of type {kind}"
