"""Finding the files of a source: which are read, by their names, and why the others are left out."""

from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import Path

COMPRESSIONS = (".xz", ".zst", ".gz", ".bz2")
FORMATS: Mapping[str, str] = {
    ".txt": ".txt",
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    ".json": ".jsonl",
    ".parquet": ".parquet",
}
TABLES = (".csv", ".tsv")  # read where they are named, or are a data set of the hub; beside texts they are often none
METADATA = {  # what data sets keep beside their rows, and `source.json` of a download
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "license",
    "license.md",
    "readme.md",
    "source.json",
    "state.json",
}
_SHOWN = 5
_EXPANSION = {".xz": 4.5, ".zst": 3.0, ".gz": 3.0, ".bz2": 4.0, ".parquet": 2.0}  # text per byte, about


def file_format(name: str) -> str | None:
    """Return the format of a file that can be read, compressed or not: an ending without compression; else None."""
    inner = _uncompressed(name)
    ending = Path(inner).suffix.lower()
    found = ending if ending in TABLES else FORMATS.get(ending)
    return None if found == ".parquet" and inner != name else found


def text_bytes(path: Path) -> int:
    """Return about how many bytes of text a file holds, from its size and compression."""
    return int(path.stat().st_size * _EXPANSION.get(path.suffix.lower(), 1.0)) + 1


def file_stem(name: str) -> str:
    """Return a file's name without the endings that tell its format."""
    return Path(_uncompressed(name)).stem


def _uncompressed(name: str) -> str:
    path = Path(name)
    return path.stem if path.suffix.lower() in COMPRESSIONS else name


def reason_to_leave(name: str) -> str | None:
    """Return why a file is left out, from its name, which may hold folders; None if it is read."""
    parts = name.split("/")
    if any(part.startswith(".") for part in parts):
        return "hidden"
    if parts[-1].lower() in METADATA:
        return "metadata"
    found = file_format(parts[-1])
    if found in TABLES:
        return "a table: read if it is named itself"
    return None if found else "unknown extension"


def find_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Return `path` itself, or the files below it that are read, sorted; and for each other one its name and reason.

    Links to folders are followed, after all else, and no folder is entered twice.
    """
    if not path.is_dir():
        return ([path], {}) if path.is_file() and file_format(path.name) else ([], {})
    root, entered = path.resolve(), set[Path]()
    files: list[Path] = []
    left_out: dict[str, str] = {}
    folders, links = [path], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = folder.resolve()
        if real in entered or (folder != path and root.is_relative_to(real)):
            left_out[folder.relative_to(path).as_posix()] = "link to a folder that is read anyway"
            continue
        entered.add(real)
        for inner in sorted(folder.iterdir()):
            name = inner.relative_to(path).as_posix()
            if inner.is_dir() and not inner.name.startswith("."):
                (links if inner.is_symlink() else folders).append(inner)
            elif not inner.exists():
                left_out[name] = "broken link"
            elif reason := reason_to_leave(name):
                left_out[name] = reason
            elif not inner.is_file():
                left_out[name] = "no plain file"
            else:
                files.append(inner)
    return sorted(files), left_out


def data_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Return what `find_files` finds.

    Raises:
        FileNotFoundError: there is nothing, or nothing in a known format.
    """
    files, left_out = find_files(path)
    if not files:
        raise nothing_to_read(path, " ".join(FORMATS), left_out)
    return files, left_out


def nothing_to_read(path: Path, wanted: str, left_out: Mapping[str, str]) -> FileNotFoundError:
    """Return the error for a path with no file that can be read."""
    got = f"none: {describe(left_out.items())}" if left_out else "none"
    return FileNotFoundError(f"data: {path} must hold {wanted} files (or {' '.join(COMPRESSIONS)} of them), got {got}")


def describe(left_out: Collection[tuple[str, str]]) -> str:
    """Return one line on the files left out, which names the first of them with their reasons."""
    named = [f"{name} ({reason})" for name, reason in islice(left_out, _SHOWN)]
    rest = [f"and {len(left_out) - _SHOWN:,} more"] if len(left_out) > _SHOWN else []
    count = f"{len(left_out):,} file{'s' if len(left_out) > 1 else ''}"
    return f"left out {count}: " + ", ".join(named + rest)
