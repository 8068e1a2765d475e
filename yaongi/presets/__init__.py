"""The presets, one TOML file each in this folder, and the reader of presets and of users' own files.

Those in `continue/` have no model of their own: they go on from weights that are there.
"""

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

CONTINUE = "continue"


def preset_names() -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(
        entry.name.removesuffix(".toml") for entry in files(__name__).iterdir() if entry.name.endswith(".toml")
    )


def read_preset(name: str | Path, *, whole: bool = True) -> dict[str, Any]:
    """Read the tables of a preset, or of a TOML file given by its path: `model`, and perhaps `train`.

    Args:
        whole: whether it must have a model, and not only what goes on with one.

    Raises:
        FileNotFoundError: there is no such preset or file; the message lists the presets.
        ValueError: the file is not TOML, or has no model though it must have one.
    """
    path = Path(name) if str(name).endswith(".toml") else files(__name__).joinpath(f"{name}.toml")
    if not path.is_file():
        known = ", ".join([*preset_names(), *continuations()])
        raise FileNotFoundError(f"preset: name must be one of {known}, or the path of a .toml file, got {str(name)!r}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"preset: {path.name} must be TOML, got {error}") from error
    if whole and not has_model(tables):
        got = ", ".join(tables) or "nothing"
        raise ValueError(f"preset: {path.name} must have a [model] table with a pattern, or go with --init, got {got}")
    return tables


def has_model(tables: dict[str, Any]) -> bool:
    """Return whether a preset's tables have a whole model."""
    return "pattern" in tables.get("model", {})


def continuations() -> list[str]:
    """Return the names of the presets that go on from weights that are there, sorted."""
    folder = files(__name__).joinpath(CONTINUE)
    return sorted(f"{CONTINUE}/{entry.name.removesuffix('.toml')}" for entry in folder.iterdir())
