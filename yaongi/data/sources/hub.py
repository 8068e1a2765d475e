"""Data sets of the hub: those of the 15 B-token mix and any other, and their files on the hub or in a mirror folder."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import IO, Protocol

from yaongi.data.mix import check_domain
from yaongi.data.sources.files import FORMATS, TABLES, file_format, reason_to_leave

BYTES_PER_TOKEN: Mapping[str, float] = {"ko": 4.8, "en": 4.1, "code": 3.3, "math": 3.4}  # to convert a budget
OTHER_BYTES_PER_TOKEN = 4.0


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub.

    Attributes:
        share: percent of the mix's tokens.
        files: glob patterns of its files (`*` also matches `/`).
        fields: columns that may hold a row's text; only these are read, so changing types in others don't matter.
        revision: branch, tag or commit; the first download resolves it to a commit, and later ones use that commit.
        fallback: name of the source in `FALLBACKS` to take if this one is unavailable.
        blobs: rows hold no text but a `blob_id`; the content is in Software Heritage's bucket.
        subset: read the files of the train split of this subset (its only one if empty), not those of `files`.
    """

    domain: str
    share: float
    id: str
    files: tuple[str, ...] = ("*",)
    fields: tuple[str, ...] = ("text",)
    revision: str = "main"
    fallback: str | None = None
    blobs: bool = False
    subset: str | None = None


HUB_SOURCES: Mapping[str, HubSource] = {
    "korean-synthetic": HubSource("ko", 20, "HAERAE-HUB/KOREAN-SyntheticText-1.5B"),
    "cosmopedia-ko": HubSource("ko", 10, "KORMo-Team/Cosmopedia-ko-synth"),
    "wikipedia-ko": HubSource("ko", 5, "lcw99/wikipedia-korean-20240501", fallback="wikimedia-ko"),
    "fineweb2-ko": HubSource("ko", 5, "KORMo-Team/FineWeb2-ko-synth"),
    "dolmino": HubSource("en", 10, "allenai/dolma3_dolmino_mix-10B-1025"),
    "fineweb-edu": HubSource("en", 10, "HuggingFaceFW/fineweb-edu", ("sample/10BT/*",)),
    "dolci-python": HubSource("code", 10, "allenai/Dolci-Think-SFT-Python", fields=("messages",)),
    "stack-edu": HubSource(
        "code",
        15,
        "HuggingFaceTB/stack-edu",
        ("Python/*",),
        ("blob_id", "src_encoding"),
        fallback="python-edu",
        blobs=True,
    ),
    "finemath": HubSource("math", 15, "HuggingFaceTB/finemath", ("finemath-4plus/*",)),
}
FALLBACKS: Mapping[str, HubSource] = {
    "wikimedia-ko": HubSource("ko", 5, "wikimedia/wikipedia", ("20231101.ko/*",)),
    "python-edu": HubSource("code", 15, "Avelina/python-edu-cleaned"),
}


def named_sources(specs: Sequence[str], text_field: str) -> dict[tuple[str, str], HubSource]:
    """Return the data sets of specs such as `hf:OWNER/NAME`, `hf:OWNER/NAME:SUBSET` and `law=hf:…`, at equal shares.

    Args:
        text_field: field of the rows that holds the text; `text` if empty.

    Returns:
        The data sets, by domain and folder; the domain is NAME if the spec gives none.

    Raises:
        ValueError: a spec has another form, or two name the same.
    """
    found: dict[tuple[str, str], HubSource] = {}
    for spec in specs:
        parts = re.fullmatch(r"(?:([^=]+)=)?hf:([\w.-]+)/([\w.-]+)(?::([^:]+))?", spec)
        if not parts:
            raise ValueError(
                f"download: source must be hf:OWNER/NAME, hf:OWNER/NAME:SUBSET or DOMAIN=hf:…, got {spec!r}"
            )
        domain, owner, name, subset = parts.groups()
        key = check_domain(domain or name), "--".join(filter(None, (owner, name, subset))).replace("/", "-")
        if key in found:
            raise ValueError(f"download: sources must differ, got {spec!r} twice")
        fields = (text_field or "text",)
        found[key] = HubSource(key[0], 100 / len(specs), f"{owner}/{name}", fields=fields, subset=subset or "")
    return found


def planned_share(id: str) -> float | None:
    """Return a data set's percent of the public mix's tokens; None for any other."""
    shares = {source.id: source.share for source in (*HUB_SOURCES.values(), *FALLBACKS.values())}
    return shares.get(id)


class Repository(Protocol):
    """One data set at one revision."""

    revision: str
    licence: str

    def names(self) -> list[str]:
        """Return the names of all files."""

    def subsets(self) -> list[str]:
        """Return the names of its subsets."""

    def splits(self, subset: str) -> dict[str, list[str]]:
        """Return the names of the files of each split of `subset`; if that is empty, of the only or default one.

        Raises:
            ValueError: there is no such subset, or several and none is named, or its files can't be read.
            OSError: it can't be reached.
        """

    def open(self, name: str) -> IO[bytes]:
        """Open a file, seekable; only what is read is transferred."""


class HubRepository:
    """A data set on the Hugging Face hub, at a commit."""

    def __init__(self, source: HubSource, revision: str | None = None) -> None:
        """Resolve `revision` (or the source's) to a commit. Raises OSError or HfHubHTTPError if that fails."""
        from huggingface_hub import HfApi, HfFileSystem

        info = HfApi().dataset_info(source.id, revision=revision or source.revision)
        self._id, self._fs = source.id, HfFileSystem()
        self._names = [sibling.rfilename for sibling in info.siblings or []]
        self.revision = info.sha or source.revision
        licence = (info.card_data.to_dict() if info.card_data else {}).get("license")
        self.licence = str(licence) if licence else "not stated"

    def names(self) -> list[str]:
        """Return the names of all files."""
        return self._names

    def subsets(self) -> list[str]:
        """Return the names of its subsets."""
        return _subsets(self._id, self.revision)

    def splits(self, subset: str) -> dict[str, list[str]]:
        """Return the names of the files of each split of `subset`; if that is empty, of the only or default one."""
        return _splits(self._id, subset, self.revision, f"hf://datasets/{self._id}@{self.revision}/")

    def open(self, name: str) -> IO[bytes]:
        """Open a file that is read in ranges."""
        return self._fs.open(f"datasets/{self._id}@{self.revision}/{name}", "rb")


class MirrorRepository:
    """A local copy of a data set, in `MIRROR/owner/name/…`."""

    def __init__(self, mirror: Path, source: HubSource) -> None:
        """Find the data set. Raises FileNotFoundError if the mirror lacks it."""
        self._folder = mirror / source.id
        if not self._folder.is_dir():
            raise FileNotFoundError(f"download: {source.id} is not in the mirror {mirror}")
        self.revision, self.licence = "mirror", "as on its card"

    def names(self) -> list[str]:
        """Return the names of all files."""
        files = (path for path in self._folder.rglob("*") if path.is_file())
        return [path.relative_to(self._folder).as_posix() for path in files]

    def subsets(self) -> list[str]:
        """Return the names of its subsets."""
        return _subsets(str(self._folder), None)

    def splits(self, subset: str) -> dict[str, list[str]]:
        """Return the names of the files of each split of `subset`; if that is empty, of the only or default one."""
        return _splits(str(self._folder), subset, None, f"{self._folder.resolve()}/")

    def open(self, name: str) -> IO[bytes]:
        """Open a file."""
        return (self._folder / name).open("rb")


def _subsets(path: str, revision: str | None) -> list[str]:
    from datasets import get_dataset_config_names

    return get_dataset_config_names(path, revision=revision)


def _splits(path: str, subset: str, revision: str | None, root: str) -> dict[str, list[str]]:
    """Return the files of a subset below `root`, as the data set's card or their names tell the `datasets` library."""
    from datasets import get_dataset_default_config_name, load_dataset_builder

    subsets = _subsets(path, revision)
    chosen = subset or get_dataset_default_config_name(path, revision=revision)
    if chosen not in subsets:
        raise ValueError(f"download: the subset of {path} must be one of {', '.join(subsets)}, got {chosen or 'none'}")
    try:
        splits = load_dataset_builder(path, chosen, revision=revision).config.data_files or {}
    except ValueError as error:
        raise ValueError(f"download: {path} can't be used: {error}") from error
    found = {str(split): [str(file).removeprefix(root) for file in files] for split, files in splits.items()}
    if unknown := [file for files in found.values() for file in files if not file_format(file)]:
        raise ValueError(f"download: files of {path} must be {' '.join((*FORMATS, *TABLES))}, got {unknown[0]}")
    return found


def data_names(source: HubSource, repository: Repository) -> list[str]:
    """Return the files to read, ordered by the hash of their names so that a budget isn't spent on one folder.

    Raises:
        ValueError: no file matches, or a file of the subset can't be read.
    """
    if source.subset is not None:
        splits = repository.splits(source.subset)
        if "train" not in splits:
            raise ValueError(f"download: {source.id} must have a train split, got {', '.join(splits) or 'none'}")
        return sorted(splits["train"], key=_hash)
    found = [
        name
        for name in repository.names()
        if not reason_to_leave(name) and file_format(name) != ".txt" and any(fnmatch(name, p) for p in source.files)
    ]
    if not found:
        raise ValueError(f"download: {source.id} has no data files that match {' '.join(source.files)}")
    return sorted(found, key=_hash)


def _hash(name: str) -> bytes:
    return sha256(name.encode()).digest()


class BlobStore(Protocol):
    """A store of contents by blob id."""

    def get(self, blob_id: str) -> bytes | None:
        """Return the gzip-compressed content, or None if there is none."""


class SoftwareHeritage:
    """The public bucket `s3://softwareheritage/content`, over HTTPS."""

    url = "https://softwareheritage.s3.amazonaws.com/content/"

    def get(self, blob_id: str) -> bytes | None:
        """Return the gzip-compressed content, or None if there is none. Raises OSError if the bucket is unreachable."""
        from urllib.error import HTTPError
        from urllib.request import urlopen

        try:
            with urlopen(self.url + blob_id, timeout=30) as answer:
                return answer.read()
        except HTTPError as error:
            if error.code in (403, 404):
                return None
            raise


class MirrorBlobs:
    """A local copy of the bucket, in `MIRROR/softwareheritage/content/BLOB_ID`."""

    def __init__(self, mirror: Path) -> None:
        self._folder = mirror / "softwareheritage" / "content"

    def get(self, blob_id: str) -> bytes | None:
        """Return the gzip-compressed content, or None if there is none."""
        path = self._folder / blob_id
        return path.read_bytes() if path.is_file() else None
