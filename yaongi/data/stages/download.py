"""Download data sets from the hub, up to a budget: resumable by (file, row), with counts and licences recorded.

A source becomes a folder `train/DOMAIN/NAME/` with `part-00000.jsonl.zst`, … and `source.json`, which `sources` can
read directly. A part is written under a temporary name and renamed; then `source.json` records it and the next
(file, row). So an interruption loses the unfinished part, but never leaves a duplicate or a gap.
"""

import gzip
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from yaongi.data.sources.hub import (
    BYTES_PER_TOKEN,
    FALLBACKS,
    HUB_SOURCES,
    OTHER_BYTES_PER_TOKEN,
    BlobStore,
    HubRepository,
    HubSource,
    MirrorBlobs,
    MirrorRepository,
    Repository,
    SoftwareHeritage,
    data_names,
)
from yaongi.data.sources.patience import Patience, network_errors, unavailable_errors
from yaongi.data.sources.readers import Row, read_rows, row_text
from yaongi.data.sources.tally import BAD_ROWS, BadRows
from yaongi.data.stages.forecast import PACKED_BYTES, check_disk, duration, size
from yaongi.data.text import normalize
from yaongi.files import read_json, write_json

PART_BYTES = 64_000_000
_BLOBS_AT_ONCE = 64
_FETCHERS = 32
_USUAL_SPEED = 20e6  # bytes of text per second
_SAID_EVERY = 1_000_000_000  # bytes of text between two lines on how far a download is


@dataclass
class Progress:
    """What is on disk of a source, and where to continue: the content of `source.json`."""

    id: str
    revision: str
    licence: str
    file: int = 0
    row: int = 0
    parts: int = 0
    documents: int = 0
    bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    budget_bytes: int = 0
    done: bool = False
    fields: list[str] = field(default_factory=list)
    subset: str | None = None

    @property
    def rows(self) -> int:
        """Rows read, those that were skipped too."""
        return self.documents + sum(self.skipped.values())


@dataclass(frozen=True)
class Places:
    """Where data sets are read from; for tests and offline machines a local mirror."""

    repository: Callable[[HubSource, str | None], Repository]
    blobs: BlobStore
    sleep: Callable[[float], None] = time.sleep
    part_bytes: int = PART_BYTES

    @classmethod
    def of(cls, mirror: Path | None) -> "Places":
        """Return the places of the hub, or of a local mirror of it."""
        if mirror is None:
            return cls(HubRepository, SoftwareHeritage())
        return cls(lambda source, _: MirrorRepository(mirror, source), MirrorBlobs(mirror))


def public_mix(names: Sequence[str] = ()) -> dict[tuple[str, str], HubSource]:
    """Return the sources of the public mix, or those in `names`. Raises ValueError for a name that is none of them."""
    for name in names:
        if name not in HUB_SOURCES:
            raise ValueError(f"download: sources must be among {', '.join(HUB_SOURCES)}, got {name!r}")
    return {(HUB_SOURCES[name].domain, name): HUB_SOURCES[name] for name in names or HUB_SOURCES}


def download(
    out: Path,
    total_tokens: float,
    places: Places,
    sources: Mapping[tuple[str, str], HubSource],
    *,
    bad_rows: float = BAD_ROWS,
    say: Callable[[str], None] = print,
) -> dict[str, Progress]:
    """Download sources up to their shares of `total_tokens`, to `out/train/DOMAIN/NAME`.

    Args:
        sources: as `public_mix` or `named_sources` gives them, by domain and name.

    Raises:
        ValueError: a source gives no rows or too many bad ones, or the folder holds another.
        OSError: the disk has no room for the public mix, or a source could not be reached after several tries, and no
            fallback could replace it.
    """
    budgets = {
        (domain, name): int(total_tokens * source.share / 100 * BYTES_PER_TOKEN.get(domain, OTHER_BYTES_PER_TOKEN))
        for (domain, name), source in sources.items()
    }
    left = {key: _left(out.joinpath("train", *key), budget) for key, budget in budgets.items()}
    text = sum(left.values())
    disk, time = size(text * PACKED_BYTES), duration(text / _USUAL_SPEED)
    say(f"to download: up to {size(text)} of text, {disk} on the disk, {time} at {size(_USUAL_SPEED)}/s")
    planned = sum(left[key] for key, source in sources.items() if source.subset is None)  # others may be smaller
    check_disk("download", out, planned * PACKED_BYTES)
    found = {}
    for (domain, name), source in sources.items():
        folder = out / "train" / domain / name
        progress = download_source(source, folder, budgets[domain, name], places, say, bad_rows)
        skipped = "".join(f", {count:,} {reason}" for reason, count in progress.skipped.items())
        say(f"{name}: {progress.documents:,} documents{skipped}, {size(progress.bytes)}, licence: {progress.licence}")
        found[name] = progress
    return found


def download_source(
    source: HubSource,
    folder: Path,
    budget_bytes: int,
    places: Places,
    say: Callable[[str], None] = print,
    bad_rows: float = BAD_ROWS,
) -> Progress:
    """Download one source up to `budget_bytes` of UTF-8 text or its end; if it is unavailable, its fallback."""
    try:
        return _Download(source, folder, budget_bytes, places, say, bad_rows).run()
    except unavailable_errors() as error:
        if source.fallback is None or _kept(folder).get("documents"):
            raise
        say(f"{source.id}: {' '.join(str(error).split())}; taking {FALLBACKS[source.fallback].id} instead")
    (folder / "source.json").unlink(missing_ok=True)
    return _Download(FALLBACKS[source.fallback], folder, budget_bytes, places, say, bad_rows).run()


class _Download:
    """The download of one source."""

    def __init__(
        self,
        source: HubSource,
        folder: Path,
        budget_bytes: int,
        places: Places,
        say: Callable[[str], None],
        bad_rows: float,
    ) -> None:
        self.source, self.folder, self.places, self.say = source, folder, places, say
        self.bad_rows = BadRows(bad_rows, say)
        self.patience = Patience(source.id, say, places.sleep)
        folder.mkdir(parents=True, exist_ok=True)
        kept = _kept(folder)
        if kept and kept["id"] in {s.id for s in FALLBACKS.values()}:
            self.source = next(s for s in FALLBACKS.values() if s.id == kept["id"])
        self.repository = self.patience(lambda: places.repository(self.source, kept.get("revision")))
        fresh = Progress(self.source.id, self.repository.revision, self.repository.licence)
        fresh.fields, fresh.subset = list(self.source.fields), self.source.subset
        if kept and kept.get("fields", fresh.fields) != fresh.fields:
            wanted = f"from field {fresh.fields[0]}, got {kept['fields'][0]}"
            raise ValueError(f"download: text in {folder} must be {wanted}; remove it to download again")
        self.progress = Progress(**kept) if kept else fresh
        self.progress.done = self.progress.done and self.progress.budget_bytes >= budget_bytes
        self.progress.budget_bytes = max(budget_bytes, self.progress.budget_bytes)

    @cached_property
    def names(self) -> list[str]:
        """The files to read."""
        return self.patience(lambda: data_names(self.source, self.repository))

    def run(self) -> Progress:
        """Write parts until the budget is reached or the source ends, and record each in `source.json`."""
        progress = self.progress
        began, begun = time.monotonic(), progress.bytes
        texts = iter(()) if progress.done else self._texts()
        while not progress.done:
            progress = self._write_part(texts, progress)
            if not progress.documents:
                raise ValueError(f"download: {self.source.id} gave no rows with text (skipped: {progress.skipped})")
            if progress.done:
                self.bad_rows.check(progress.skipped.get("bad", 0), progress.rows)
            self._record(progress)
            if progress.bytes // _SAID_EVERY > self.progress.bytes // _SAID_EVERY and not progress.done:
                speed = (progress.bytes - begun) / (time.monotonic() - began)
                left = duration((progress.budget_bytes - progress.bytes) / speed)
                self.say(f"{progress.id}: {size(progress.bytes)} at {size(speed)}/s, up to {left} left")
            self.progress = progress
        return progress

    def _write_part(self, texts: Iterator[tuple[int, int, str | ValueError]], start: Progress) -> Progress:
        """Write one part, and return the progress to record with it."""
        import zstandard

        path = self.folder / f"part-{start.parts:05d}.jsonl.zst"
        temporary = path.with_name(path.name + ".tmp")
        now = replace(start, skipped=dict(start.skipped), done=True)
        with temporary.open("wb") as raw, zstandard.ZstdCompressor(3).stream_writer(raw) as file:
            for file_number, row, text in texts:
                now.file, now.row = file_number, row
                kept = self._clean(text, now)
                if kept is None:
                    continue
                file.write(json.dumps({"text": kept}, ensure_ascii=False).encode() + b"\n")
                now.documents += 1
                now.bytes += len(kept.encode())
                if now.bytes >= now.budget_bytes or now.bytes - start.bytes >= self.places.part_bytes:
                    now.done = now.bytes >= now.budget_bytes
                    break
        if now.documents > start.documents:
            temporary.replace(path)
            now.parts += 1
        else:
            temporary.unlink()
        return now

    def _clean(self, text: str | ValueError, now: Progress) -> str | None:
        """Return a row's text in NFC, or None if it is skipped, which `now` counts."""
        if isinstance(text, str) and text.strip():
            return normalize(text)
        reason = "empty" if isinstance(text, str) else "bad"
        now.skipped[reason] = now.skipped.get(reason, 0) + 1
        if isinstance(text, ValueError):
            self.bad_rows.skip(text, now.skipped[reason], now.rows)
        return None

    def _record(self, progress: Progress) -> None:
        write_json(self.folder / "source.json", asdict(progress))

    def _texts(self) -> Iterator[tuple[int, int, str | ValueError]]:
        """Yield texts, or the errors of bad rows, from the recorded progress on, each with the (file, row) after it."""
        rows = self._rows()
        if not self.source.blobs:
            for file, row, record in rows:
                yield file, row, row_text(record, self.source.fields, self._where(file, row))
            return
        missing = 0
        with ThreadPoolExecutor(_FETCHERS) as pool:
            while batch := list(islice(rows, _BLOBS_AT_ONCE)):
                contents = pool.map(lambda item: self.patience(lambda: self._blob(*item)), batch)
                for (file, row, _), text in zip(batch, contents, strict=True):
                    missing = 0 if text else missing + 1
                    if missing > 4 * _BLOBS_AT_ONCE:
                        raise ValueError(f"download: {missing} contents of {self.source.id} in a row are not to be had")
                    yield file, row, text

    def _where(self, file: int, row: int) -> str:
        """Return the name of the row before (file, row)."""
        return f"{self.source.id}/{self.names[file]}, row {row - 1}"

    def _blob(self, file: int, row: int, record: Row) -> str | ValueError:
        """Return the content that a row names; an empty text if it is missing or not in the encoding that it claims."""
        named = row_text(record, ("blob_id",), self._where(file, row))
        if isinstance(record, ValueError) or isinstance(named, ValueError):
            return named
        packed = self.places.blobs.get(named)
        if packed is None:
            return ""
        try:
            text = gzip.decompress(packed).decode(record.get("src_encoding") or "utf-8")
            return row_text({"text": text}, ("text",), self._where(file, row))
        except (UnicodeDecodeError, LookupError, EOFError, zlib.error, gzip.BadGzipFile):
            return ""

    def _rows(self) -> Iterator[tuple[int, int, Row]]:
        """Yield rows, each with the (file, row) after it; after a broken connection continue at the same row."""
        file, row, failures = self.progress.file, self.progress.row, 0
        while file < len(self.names):
            try:
                with self.repository.open(self.names[file]) as stream:
                    name = f"{self.source.id}/{self.names[file]}"
                    for record in read_rows(stream, name, self.source.fields, row):
                        row, failures = row + 1, 0
                        yield file, row, record
                file, row = file + 1, 0
            except network_errors() as error:
                failures += 1
                self.patience.wait(failures, error)


def _left(folder: Path, budget_bytes: int) -> int:
    """Return how many bytes of text a source still lacks."""
    kept = _kept(folder)
    if kept.get("done") and kept["budget_bytes"] >= budget_bytes:
        return 0
    return max(0, budget_bytes - kept.get("bytes", 0))


def _kept(folder: Path) -> dict[str, Any]:
    path = folder / "source.json"
    return read_json(path) if path.is_file() else {}
