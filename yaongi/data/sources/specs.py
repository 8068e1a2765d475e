"""Opening sources from the specs that users write:

* `embedded`: the corpus inside the package;
* `DOMAIN=PATH`: a file or a folder of .txt, .jsonl (also .xz, .zst, .gz) or .parquet, for ko, en, code or math;
* `PATH`: a folder that holds `train/` and perhaps `val/`, with `ko.jsonl.xz` or `ko/…` in each, as
  `python -m yaongi.data download` writes it.

If a domain has no `val` of its own, some of its documents are held out, chosen by the hash of their text.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from yaongi.data.mix import DOMAINS
from yaongi.data.sources.readers import data_files, file_format, read_documents
from yaongi.data.sources.source import TRAIN, VAL, Source
from yaongi.files import sha256_file


def open_sources(specs: Sequence[str]) -> list[Source]:
    """Open the sources that `specs` name, in order.

    Raises:
        FileNotFoundError: a path has no readable files.
        ValueError: a domain is unknown, or there is no spec.
    """
    if not specs:
        raise ValueError("data: --source must be given: embedded, DOMAIN=PATH or a folder with train/")
    found: list[Source] = []
    for spec in specs:
        domain, equals, path = spec.partition("=")
        if spec == "embedded":
            from yaongi.data.sources.embedded.corpus import embedded_sources

            found += embedded_sources()
        elif equals and domain in DOMAINS:
            found.append(_files_source(domain, None, Path(path)))
        elif Path(spec).is_dir() and (Path(spec) / TRAIN).is_dir():
            found += _folder_sources(Path(spec))
        elif Path(spec).exists():
            raise ValueError(
                f"data: --source must be DOMAIN=PATH ({', '.join(DOMAINS)}) or a folder with train/, got {spec}"
            )
        else:
            raise FileNotFoundError(f"data: no such source: {spec}")
    return found


def _folder_sources(folder: Path) -> list[Source]:
    """Return the sources in `train/DOMAIN…` and `val/DOMAIN…`; each subfolder of `train/DOMAIN/` is a source."""
    found = []
    for domain in DOMAINS:
        parts = {split: _domain_paths(folder / split, domain) for split in (TRAIN, VAL)}
        for split, paths in parts.items():
            whole = split if parts[VAL] else None
            found += [_files_source(domain, whole, path) for path in paths]
    if not found:
        raise FileNotFoundError(f"data: {folder / TRAIN} must hold {', '.join(DOMAINS)} files or folders, got none")
    return found


def _domain_paths(folder: Path, domain: str) -> list[Path]:
    if not folder.is_dir():
        return []
    files = [p for p in folder.iterdir() if p.is_file() and p.name.split(".")[0] == domain and file_format(p.name)]
    inner = folder / domain
    if inner.is_dir():
        parts = sorted(p for p in inner.iterdir() if p.is_dir())
        files += parts or [inner]
    return sorted(files)


def _files_source(domain: str, split: str | None, path: Path) -> Source:
    files = data_files(path)
    about = path / "source.json"
    record = json.loads(about.read_text()) if about.is_file() else {}

    def documents() -> Iterator[str]:
        for file in files:
            yield from read_documents(file)

    def fingerprint() -> str:
        return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()

    name = record.get("id", path.name.split(".")[0])
    return Source(domain, split, name, record.get("licence", "not stated"), documents, fingerprint)
