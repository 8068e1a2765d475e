"""Atomic writes, file hashes, and JSON files."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUMS = "SHA256SUMS"  # the hashes of a folder's files, as `sha256sum` writes them


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


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file with one per line; a last line without its end, half-written, is left out.

    Raises:
        ValueError: another line is no JSON object.
    """
    records = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"log: line {number} of {path} is damaged: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"log: line {number} of {path} must be a JSON object, got {type(record).__name__}")
        records.append(record)
    return records


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as a JSON file, atomically; text in any language stays readable."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="backslashreplace"))  # a lone surrogate becomes its escape in JSON


def has_sums(folder: Path) -> bool:
    """Return whether a folder has hashes; checkpoints saved by earlier versions have none."""
    return (folder / SUMS).is_file()


def read_sums(folder: Path) -> dict[str, str]:
    """Return the hash of each file; none for a folder without hashes. Raises ValueError if they can't be read."""
    if not has_sums(folder):
        return {}
    sums = {}
    for line in (folder / SUMS).read_bytes().decode(errors="replace").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or not name or len(digest) != 64:
            raise ValueError(f"{SUMS} can't be read")
        sums[name] = digest
    if not sums:
        raise ValueError(f"{SUMS} is empty")
    return sums


def find_damage(folder: Path, part: slice = slice(None), names: tuple[str, ...] = ()) -> str | None:
    """Return what is wrong with the files of a folder that have hashes, or None.

    Args:
        part: which of the files to check, in the order of their names.
        names: check these alone; all without.
    """
    try:
        for name, digest in sorted(read_sums(folder).items())[part]:
            if names and name not in names:
                continue
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256_file(folder / name) != digest:
                return f"{name} has changed since it was saved"
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    return None
