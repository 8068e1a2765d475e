"""Opening sources from the specs that users write:

* `embedded`: the corpus inside the package;
* `DOMAIN=PATH`: a file, or a folder of files in any format of `files`, for ko, en, code or math;
* `PATH`: a folder that holds `train/` and perhaps `val/`, with `ko.jsonl.xz`, `ko-00001.jsonl` or `ko/…` in each, as
  `python -m yaongi.data download` writes it.

If a domain has no `val` of its own, some of its documents are held out, chosen by the hash of their text.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from yaongi.data.mix import DOMAINS
from yaongi.data.sources.files import data_files, file_stem, find_files, nothing_to_read, reason_to_leave
from yaongi.data.sources.readers import read_texts
from yaongi.data.sources.source import TRAIN, VAL, Source, Sources
from yaongi.data.sources.tally import BAD_ROWS, Tally
from yaongi.files import read_json, sha256_file

_SUB_FOLDER, _LOOSE, _BESIDE = range(3)  # files in DOMAIN/NAME/, in DOMAIN/, and those beside it, such as DOMAIN.jsonl


class _Group(NamedTuple):
    """A source in a folder with splits; they are in this order."""

    domain: int
    split: str
    rank: int
    name: str


def open_sources(specs: Sequence[str], bad_rows: float = BAD_ROWS, say: Callable[[str], None] = print) -> Sources:
    """Open the sources that `specs` name, in order.

    Args:
        bad_rows: the share of a source's rows that may be bad; they are skipped, and the first of them said.

    Raises:
        FileNotFoundError: a path has no readable files.
        ValueError: a domain is unknown, or there is no spec.
    """
    if not specs:
        raise ValueError("data: --source must be given: embedded, DOMAIN=PATH or a folder with train/")
    found = Sources()
    tally = partial(Tally, bad_rows, say)
    for spec in specs:
        domain, equals, path = spec.partition("=")
        left_out: dict[str, str] = {}
        if spec == "embedded":
            from yaongi.data.sources.embedded.corpus import embedded_sources

            found += embedded_sources()
        elif equals and domain in DOMAINS:
            found += _path_source(domain, Path(path), left_out, tally)
        elif Path(spec).is_dir() and (Path(spec) / TRAIN).is_dir():
            found += _folder_sources(Path(spec), left_out, tally)
        elif Path(spec).exists():
            raise ValueError(
                f"data: --source must be DOMAIN=PATH ({', '.join(DOMAINS)}) or a folder with train/, got {spec}"
            )
        else:
            raise FileNotFoundError(f"data: no such source: {spec}")
        found.left_out += left_out.items()
    return found


def _path_source(domain: str, path: Path, left_out: dict[str, str], tally: Callable[[], Tally]) -> list[Source]:
    """Return the source of a file or folder, and add to `left_out` what is not read."""
    files, others = data_files(path)
    left_out |= others
    root, name = (path, path.absolute().name) if path.is_dir() else (path.parent, file_stem(path.name))
    return [_files_source(domain, None, name, root, files, path / "source.json", tally())]


def _folder_sources(folder: Path, left_out: dict[str, str], tally: Callable[[], Tally]) -> list[Source]:
    """Return the sources in `train/DOMAIN…` and `val/DOMAIN…`, and add to `left_out` what is none of them."""
    groups: dict[_Group, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name not in (TRAIN, VAL):
            left_out[path.name] = (path.is_file() and reason_to_leave(path.name)) or f"not in {TRAIN}/ or {VAL}/"
            continue
        files, others = find_files(path)
        left_out |= {f"{path.name}/{name}": reason for name, reason in others.items()}
        for file in files:
            if group := _group(file.relative_to(folder).parts):
                groups.setdefault(group, []).append(file)
            else:
                left_out[file.relative_to(folder).as_posix()] = f"of no domain among {', '.join(DOMAINS)}"
    if not groups:
        raise nothing_to_read(folder / TRAIN, ", ".join(DOMAINS), left_out)
    divided = {group.domain for group in groups if group.split == VAL}
    found = []
    for (number, split, rank, name), files in sorted(groups.items()):
        domain, whole = DOMAINS[number], split if number in divided else None
        about = folder / split / domain / name / "source.json" if rank < _BESIDE else None
        found.append(_files_source(domain, whole, name or domain, folder, files, about, tally()))
    return found


def _group(parts: Sequence[str]) -> _Group | None:
    """Return the source of the file `train/…` or `val/…`, or None if it is of no domain."""
    found = re.match(f"({'|'.join(DOMAINS)})(?![^._-])", parts[1])
    if not found or (len(parts) > 2 and found[1] != parts[1]):
        return None
    rank = _BESIDE if len(parts) == 2 else _LOOSE if len(parts) == 3 else _SUB_FOLDER
    return _Group(DOMAINS.index(found[1]), parts[0], rank, parts[2] if rank == _SUB_FOLDER else "")


def _files_source(
    domain: str, split: str | None, name: str, root: Path, files: Sequence[Path], about: Path | None, tally: Tally
) -> Source:
    """Return the source of `files` below `root`; a `source.json` at `about` gives the name and the licence."""
    record = read_json(about) if about and about.is_file() else {}

    def documents() -> Iterator[str]:
        for file in files:
            yield from tally.counted(file.relative_to(root).as_posix(), read_texts(file))
        tally.finish()

    def fingerprint() -> str:
        return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()

    name, licence = record.get("id", name), record.get("licence", "not stated")
    return Source(domain, split, name, licence, documents, fingerprint, tally)
