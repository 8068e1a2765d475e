"""The presets, one TOML file each in this folder, and the reader of presets and of users' own files."""

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any


def preset_names() -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(
        entry.name.removesuffix(".toml") for entry in files(__name__).iterdir() if entry.name.endswith(".toml")
    )


def read_preset(name: str | Path) -> dict[str, Any]:
    """Read the tables of a preset, or of a TOML file given by its path: `model`, and perhaps `train`.

    Raises:
        FileNotFoundError: there is no such preset or file; the message lists the presets.
        ValueError: the file is not TOML, or has no [model] table.
    """
    path = Path(name) if str(name).endswith(".toml") else files(__name__).joinpath(f"{name}.toml")
    if not path.is_file():
        known = ", ".join(preset_names())
        raise FileNotFoundError(f"preset: name must be one of {known}, or the path of a .toml file, got {str(name)!r}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"preset: {path.name} must be TOML, got {error}") from error
    if not isinstance(tables.get("model"), dict):
        raise ValueError(f"preset: {path.name} must have a [model] table, got {', '.join(tables) or 'nothing'}")
    return tables
