"""Opening sources from the specs that users write:

* `embedded`: the corpus inside the package;
* `DOMAIN=PATH`: a file, or a folder of files in any format of `files`; a domain may have any name;
* `PATH`: a folder that holds `train/` and perhaps `val/`, with `ko.jsonl.xz`, `law-00001.jsonl` or `code/…` in each, as
  `python -m yaongi.data download` writes it; any other folder or file is one domain, named after it.

If a domain has no `val` of its own, some of its documents are held out, chosen by the hash of their text.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from yaongi.data.mix import check_domain, in_order
from yaongi.data.sources.files import (
    data_files,
    file_stem,
    find_files,
    nothing_to_read,
    reason_to_leave,
    text_bytes,
)
from yaongi.data.sources.hub import planned_share
from yaongi.data.sources.readers import PLAIN, Reading, read_texts
from yaongi.data.sources.source import TRAIN, VAL, Part, Source, Sources
from yaongi.data.sources.tally import Tally
from yaongi.files import read_json, sha256_file

_SUB_FOLDER, _LOOSE, _BESIDE = range(3)  # files in DOMAIN/NAME/, in DOMAIN/, and those beside it, such as DOMAIN.jsonl
_NUMBER = re.compile(r"([-_.]\d+)+([-_.]of[-_.]\d+)?$")  # of a file among several of one domain


class _Group(NamedTuple):
    """A source in a folder with splits; those of a domain are in this order."""

    split: str
    rank: int
    name: str


def open_sources(specs: Sequence[str], reading: Reading = PLAIN, say: Callable[[str], None] = print) -> Sources:
    """Open the sources that `specs` name, in order.

    Args:
        reading: how files are read; bad rows are skipped, and the first of them said.

    Raises:
        FileNotFoundError: a path has no readable files.
        ValueError: a domain can't have its name, or there is no spec.
    """
    if not specs:
        raise ValueError("data: --source must be given: embedded, DOMAIN=PATH or a folder")
    found = Sources()
    for spec in specs:
        opened, left_out = _open(spec, _Opener(reading, say))
        found += opened
        found.left_out += left_out.items()
    return found


def _open(spec: str, opener: "_Opener") -> tuple[list[Source], dict[str, str]]:
    """Return the sources of one spec, and what is not read there: names with reasons."""
    domain, equals, path = spec.partition("=")
    if spec == "embedded":
        from yaongi.data.sources.embedded.corpus import embedded_sources

        return embedded_sources(), {}
    if (Path(spec) / TRAIN).is_dir():
        return opener.folder(Path(spec))
    if (Path(spec) / VAL).is_dir():
        raise ValueError(f"data: {spec} must hold {TRAIN}/ beside {VAL}/, got none")
    if Path(spec).exists():
        name = Path(spec).absolute().name
        return opener.path(_domain(name if Path(spec).is_dir() else file_stem(name), spec), Path(spec))
    if (path if equals else spec).startswith("hf:"):
        again = f"python -m yaongi.data download --source {spec} --out FOLDER, then --source FOLDER"
        raise ValueError(f"data: {spec} must be downloaded first: {again}")
    if not equals:
        raise FileNotFoundError(f"data: no such source: {spec}")
    return opener.path(check_domain(domain), Path(path))


def _domain(name: str, path: str) -> str:
    try:
        return check_domain(name)
    except ValueError as error:
        raise ValueError(f"{error}; write --source DOMAIN={path}") from error


class _Opener:
    """The sources of paths."""

    def __init__(self, reading: Reading, say: Callable[[str], None]) -> None:
        self._reading, self._tally = reading, partial(Tally, reading.bad_rows, say, reading.max_document_bytes)

    def path(self, domain: str, path: Path) -> tuple[list[Source], dict[str, str]]:
        """Return the source of a file or folder, and what is not read."""
        files, others = data_files(path)
        root, name = (path, path.absolute().name) if path.is_dir() else (path.parent, file_stem(path.name))
        return [self._source(domain, None, name, root, files, path / "source.json")], others

    def folder(self, folder: Path) -> tuple[list[Source], dict[str, str]]:
        """Return the sources in `train/DOMAIN…` and `val/DOMAIN…`, and what is none of them."""
        groups, left_out = _groups(folder)
        if not groups:
            raise nothing_to_read(folder / TRAIN, "DOMAIN", left_out)
        found = []
        for domain in in_order(groups):
            divided = any(group.split == VAL for group in groups[domain])
            for group, files in sorted(groups[domain].items()):
                depth = {_SUB_FOLDER: 3, _LOOSE: 2}.get(group.rank)  # of the folder that a download describes
                about = folder.joinpath(*files[0].relative_to(folder).parts[:depth], "source.json") if depth else None
                split = group.split if divided else None
                found.append(self._source(domain, split, group.name or domain, folder, files, about))
        return found, left_out

    def _source(
        self, domain: str, split: str | None, name: str, root: Path, files: Sequence[Path], about: Path | None
    ) -> Source:
        """Return the source of `files` below `root`; if a download left a `source.json` at `about`, it describes it."""
        record = read_json(about) if about and about.is_file() else {}
        reading = replace(self._reading, text_field="text", encoding="utf-8") if record else self._reading
        tally = self._tally()

        def part(file: Path) -> Part:
            name = file.relative_to(root).as_posix()
            return Part(text_bytes(file), lambda: tally.counted(name, read_texts(file, reading)))

        def fingerprint() -> str:
            read = [(file.relative_to(root).as_posix(), sha256_file(file)) for file in files]
            return hashlib.sha256(json.dumps(read).encode()).hexdigest()

        name, licence = record.get("id", name), record.get("licence", "not stated")
        parts = [part(file) for file in files]
        return Source(domain, split, name, licence, parts, fingerprint, planned_share(name), tally)


def _groups(folder: Path) -> tuple[dict[str, dict[_Group, list[Path]]], dict[str, str]]:
    """Return the files of each domain's sources in a folder with splits, and what is not read."""
    groups: dict[str, dict[_Group, list[Path]]] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name not in (TRAIN, VAL):
            left_out[path.name] = (path.is_file() and reason_to_leave(path.name)) or f"not in {TRAIN}/ or {VAL}/"
            continue
        files, others = find_files(path)
        left_out |= {f"{path.name}/{name}": reason for name, reason in others.items()}
        for file in files:
            domain, group = _group(file.relative_to(folder).parts, str(file))
            groups.setdefault(domain, {}).setdefault(group, []).append(file)
    return groups, left_out


def _group(parts: Sequence[str], path: str) -> tuple[str, _Group]:
    """Return the domain and the source of the file `train/…` or `val/…`."""
    split, first, *rest = parts
    if not rest:
        return _domain(_NUMBER.sub("", file_stem(first)), path), _Group(split, _BESIDE, "")
    sub_folder = len(rest) > 1
    return _domain(first, path), _Group(split, _SUB_FOLDER if sub_folder else _LOOSE, rest[0] if sub_folder else "")
