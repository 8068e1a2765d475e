"""Atomic writes, file hashes, and JSON files."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file beside `path`, flush it to disk, then rename it to `path`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several processes may write the same path
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read the object of a JSON file. Raises ValueError if the file isn't a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name}: must be JSON, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: must be a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as a JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
