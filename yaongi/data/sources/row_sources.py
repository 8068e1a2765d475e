"""Sources whose rows are read as they are, such as conversations, from the specs that users write:

* `PATH`: a file, or a folder of files in any format of `files`; one that holds `train/` and `val/` has both splits;
* `hf:OWNER/NAME`, `hf:OWNER/NAME:SUBSET`, `hf:OWNER/NAME:SUBSET:SPLIT`: a data set of the hub, its split `train`;
* `embedded:instructions`, `embedded:preferences`, `…:COUNT`: conversations of the package, in both splits.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from yaongi.data.sources.embedded.corpus import OURS
from yaongi.data.sources.embedded.instructions import instruction_rows, preference_rows
from yaongi.data.sources.files import data_files, describe
from yaongi.data.sources.hub import HubRepository, HubSource, MirrorRepository, Repository
from yaongi.data.sources.patience import Patience, network_errors
from yaongi.data.sources.readers import PLAIN, Row, read_rows
from yaongi.data.sources.source import TRAIN, VAL
from yaongi.files import sha256_file

_EMBEDDED: Mapping[str, Callable[..., Iterator[Row]]] = {
    "instructions": instruction_rows,
    "preferences": preference_rows,
}
_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)(?::([^:]*))?(?::([^:]+))?")


@dataclass(frozen=True)
class RowFile:
    """A file of a source."""

    name: str
    rows: Callable[[], Iterator[Row]]
    fingerprint: Callable[[], str]  # changes if a row changes


@dataclass(frozen=True)
class RowSource:
    """Rows of one origin; if `split` is None, whoever reads them divides them into both splits."""

    name: str
    split: str | None
    licence: str
    files: Sequence[RowFile]


def open_row_sources(
    specs: Sequence[str],
    *,
    encoding: str = PLAIN.encoding,
    mirror: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[RowSource]:
    """Open the sources that `specs` name, in order.

    Args:
        encoding: of text files and JSON lines.
        mirror: a local copy of the hub, in `MIRROR/owner/name/…`; None: the hub.
        say: told which files beside the sources' are not read, and of tries to reach the hub.

    Raises:
        FileNotFoundError: a path has no readable files, or the mirror lacks a data set.
        OSError: the hub can't be reached.
        ValueError: there is no spec, or one names what there is not.
    """
    if not specs:
        raise ValueError(
            "data: --source must be given: a file, a folder, hf:OWNER/NAME or embedded:instructions, got none"
        )
    found: list[RowSource] = []
    for spec in specs:
        if spec.startswith("hf:"):
            found.append(_of_hub(spec, mirror, say))
        elif spec.partition(":")[0] == "embedded":
            found += _embedded(spec)
        else:
            found += _local(Path(spec), encoding, say)
    return found


def _local(path: Path, encoding: str, say: Callable[[str], None]) -> list[RowSource]:
    if not path.exists():
        raise FileNotFoundError(f"data: no such source: {path}")
    parts: list[tuple[str | None, Path]] = [(split, path / split) for split in (TRAIN, VAL)]
    if not all(place.is_dir() for _, place in parts):
        parts = [(None, path)]
    found = []
    for split, place in parts:
        there, left_out = data_files(place)
        if left_out:
            say(describe(left_out.items()))
        files = [RowFile(str(f), partial(_rows, f, encoding), partial(sha256_file, f)) for f in there]
        found.append(RowSource(path.absolute().name, split, "not stated", files))
    return found


def _rows(path: Path, encoding: str) -> Iterator[Row]:
    with path.open("rb") as file:
        yield from read_rows(file, str(path), None, encoding=encoding)


def _of_hub(spec: str, mirror: Path | None, say: Callable[[str], None]) -> RowSource:
    match = _HUB.fullmatch(spec)
    if not match:
        raise ValueError(f"data: source must be hf:OWNER/NAME, hf:OWNER/NAME:SUBSET or …:SUBSET:SPLIT, got {spec!r}")
    name, subset, split = match[1], match[2] or "", match[3] or "train"
    source = HubSource("", 100, name, subset=subset)
    patience = Patience(name, say)
    repository: Repository = (
        patience(partial(HubRepository, source)) if mirror is None else MirrorRepository(mirror, source)
    )
    splits = patience(partial(repository.splits, subset))
    if split not in splits:
        raise ValueError(f"data: the split of {name} must be one of {', '.join(splits) or 'none'}, got {split}")
    files = [
        RowFile(f"{name}/{file}", partial(hub_rows, repository, file, patience), partial(str, repository.revision))
        for file in sorted(splits[split])
    ]
    return RowSource(spec.removeprefix("hf:"), None, repository.licence, files)


def hub_rows(repository: Repository, name: str, patience: Patience) -> Iterator[Row]:
    """Yield the rows of a file; where the connection breaks, go on with the next row."""
    rows = failures = 0
    while True:
        try:
            with repository.open(name) as file:
                for row in read_rows(file, name, None, rows):
                    yield row
                    rows, failures = rows + 1, 0
            return
        except network_errors() as error:
            failures += 1
            patience.wait(failures, error)


def _embedded(spec: str) -> list[RowSource]:
    match = re.fullmatch(rf"embedded:({'|'.join(_EMBEDDED)})(?::([1-9]\d*))?", spec)
    if not match:
        raise ValueError(f"data: source must be embedded:{' or embedded:'.join(_EMBEDDED)}, or …:COUNT, got {spec!r}")
    name, count = match.groups()
    options = [int(count)] if count else []

    def file(split: str) -> RowFile:
        rows = partial(_EMBEDDED[name], split, *options)
        return RowFile(f"{spec}, {split}", rows, lambda: sha256(repr(list(rows())).encode()).hexdigest())

    return [RowSource(spec, split, OURS, [file(split)]) for split in (TRAIN, VAL)]
