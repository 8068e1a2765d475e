"""Token shards on disk.

A folder of shards holds `manifest.json`, `tokenizer/`, `token_bytes.npy` (UTF-8 bytes of each id) and, for each
split and domain, pairs of files::

    train/ko-00000.bin   the ids of its documents one after another, each ending in EOS: uint16, little-endian
    train/ko-00000.idx   for each document, the end of its ids and its UTF-8 bytes: uint64 (documents, 2)

Conversations (`chats.rows`) are documents without EOS, of which only a part is learnt: their UTF-8 bytes are those of
that part, and a third file says which ids belong to it::

    train/chat-00000.mask   a bit for each id, the first in the lowest bit

The manifest lists SHA-256, tokens, bytes, documents, source and licence of each shard, and the tokenizer's hash. The
folder is built under another name and renamed when complete, so a manifest always describes complete files.
"""

import errno
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from yaongi.files import sha256_file, write_atomically, write_json

MANIFEST = "manifest.json"
TOKEN_BYTES = "token_bytes.npy"
VERIFIED = ".verified.json"
VERSION = 1
TEXT = "text"  # the kind of a folder; others are those of `chats.rows`
MADE_BY = {TEXT: "tokenize"}  # by kind, the command that makes a folder; for others: chat
TOKEN = np.dtype("<u2")


@dataclass(frozen=True)
class Shard:
    """One pair of files, as the manifest describes it."""

    file: str
    index: str
    sha256: str
    index_sha256: str
    tokens: int
    bytes: int
    documents: int
    source: str
    licence: str
    mask: str | None = None  # of conversations
    mask_sha256: str | None = None

    def described(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class ShardWriter:
    """A writer of one source's documents into shards of about `shard_tokens` tokens."""

    def __init__(self, folder: Path, stem: str, source: str, licence: str, shard_tokens: int, vocab_size: int) -> None:
        self._folder, self._stem, self._source, self._licence = folder, stem, source, licence
        self._shard_tokens, self._vocab_size = shard_tokens, vocab_size
        self._file: IO[bytes] | None = None
        self.shards: list[Shard] = []

    def add(self, tokens: NDArray[np.int32], text_bytes: int, mask: NDArray[np.bool_] | None = None) -> None:
        """Append a document.

        Args:
            tokens: (n,), its ids with EOS.
            text_bytes: UTF-8 bytes of its text; of a conversation, of what is learnt.
            mask: (n,), of a conversation which of the ids are learnt; all documents of a writer have one, or none.

        Raises:
            ValueError: an id is outside the vocabulary or above 65,535.
        """
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= min(self._vocab_size, 1 << 16):
            got = low if low < 0 else high
            raise ValueError(f"shards: ids must be 0 to {min(self._vocab_size, 1 << 16) - 1}, got {got}")
        if self._file is None:
            self._open()
        data = tokens.astype(TOKEN).tobytes()
        self._hash.update(data)
        self._file.write(data)  # type: ignore[union-attr]
        self._tokens += len(tokens)
        self._rows.append((self._tokens, text_bytes))
        if mask is not None:
            self._masks.append(mask)
        if self._tokens >= self._shard_tokens:
            self.close()

    def close(self) -> None:
        """Complete the open shard, if there is one."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        index = np.array(self._rows, "<u8").tobytes()
        (self._folder / f"{self._name}.idx").write_bytes(index)
        text_bytes = sum(size for _, size in self._rows)
        digests = self._hash.hexdigest(), hashlib.sha256(index).hexdigest()
        counts = self._tokens, text_bytes, len(self._rows)
        files = f"{self._name}.bin", f"{self._name}.idx"
        self.shards.append(Shard(*files, *digests, *counts, self._source, self._licence, *self._close_mask()))

    def _close_mask(self) -> tuple[str, str] | tuple[None, None]:
        """Write the mask, if there is one; return its file and SHA-256."""
        if not self._masks:
            return None, None
        name = f"{self._name}.mask"
        bits = np.packbits(np.concatenate(self._masks), bitorder="little").tobytes()
        (self._folder / name).write_bytes(bits)
        return name, hashlib.sha256(bits).hexdigest()

    def _open(self) -> None:
        self._name = f"{self._stem}-{len(self.shards):05d}"
        path = self._folder / f"{self._name}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._rows: list[tuple[int, int]] = []
        self._masks: list[NDArray[np.bool_]] = []
        self._tokens = 0


def totals(shards: Sequence[Shard]) -> dict[str, int]:
    """Return the sums of tokens, bytes and documents over several shards."""
    return {key: sum(getattr(shard, key) for shard in shards) for key in ("tokens", "bytes", "documents")}


def write_manifest(folder: Path, splits: dict[str, dict[str, list[Shard]]], **fields: Any) -> None:
    """Write `manifest.json`; `fields` are added to it unchanged."""
    described = {
        split: {
            domain: {**totals(shards), "shards": [s.described() for s in shards]} for domain, shards in domains.items()
        }
        for split, domains in splits.items()
    }
    manifest = {"version": VERSION, **fields, "splits": described}
    write_atomically(folder / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1).encode())


@dataclass(frozen=True)
class ShardSet:
    """A folder of shards that was opened and checked."""

    folder: Path
    manifest: dict[str, Any]
    hash: str  # SHA-256 of manifest.json, which covers all content because the manifest lists every file's hash

    @classmethod
    def open(cls, folder: str | Path, *, tokenizer_hash: str | None = None, kind: str = TEXT) -> "ShardSet":
        """Read the manifest, and check every file against it.

        SHA-256 is computed only for files whose size or modification time has changed since the last check. So the
        first start after a copy reads everything once, and later starts are instant; `tokenize` records its check too.

        Raises:
            FileNotFoundError: there is no manifest, or a file that it lists is missing.
            ValueError: the folder holds another kind, the shards were made with another tokenizer, or a file was
                truncated or changed.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        command = f"python -m yaongi.data {MADE_BY.get(kind, 'chat')}"
        if not path.is_file():
            made = f"{command} --out {shlex.quote(str(folder))}"
            raise FileNotFoundError(f"shards: no {MANIFEST} in {folder}; make it with {made}")
        content = path.read_bytes()
        try:
            manifest = json.loads(content)
            version, built_for = manifest["version"], manifest["tokenizer_hash"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"shards: {path} is damaged ({error}); run {command} again") from error
        if version != VERSION:
            raise ValueError(f"shards: {path} must be of version {VERSION}, got {version}")
        if (got := manifest.get("kind", TEXT)) != kind:
            raise ValueError(f"shards: {folder} must hold {kind}, as {command} writes it, got {got}")
        if tokenizer_hash is not None and tokenizer_hash != built_for:
            raise ValueError(f"shards: {folder} was made with tokenizer {built_for[:12]}, got {tokenizer_hash[:12]}")
        _verify(folder, manifest, command)
        return cls(folder, manifest, hashlib.sha256(content).hexdigest())

    def shards(self, split: str, domain: str) -> list[Shard]:
        """Return the shards of a domain, in order; none if the domain is missing."""
        return [Shard(**s) for s in self.manifest["splits"].get(split, {}).get(domain, {}).get("shards", [])]

    def tokens(self, split: str) -> dict[str, int]:
        """Return the tokens of each domain of a split."""
        return {domain: int(part["tokens"]) for domain, part in self.manifest["splits"].get(split, {}).items()}

    def index(self, shard: Shard) -> NDArray[np.uint64]:
        """Return the ends and UTF-8 bytes of a shard's documents: (documents, 2)."""
        return np.fromfile(self.folder / shard.index, "<u8").reshape(-1, 2)

    def token_bytes(self) -> NDArray[np.int32]:
        """Return the UTF-8 bytes that each id stands for: (vocab_size,)."""
        return np.load(self.folder / TOKEN_BYTES)


def described_files(manifest: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Return the SHA-256 and the size in bytes of every file that a manifest describes."""
    files = {TOKEN_BYTES: (manifest["token_bytes_sha256"], manifest["token_bytes_size"])}
    for domains in manifest["splits"].values():
        for domain in domains.values():
            for shard in domain["shards"]:
                files[shard["file"]] = (shard["sha256"], shard["tokens"] * TOKEN.itemsize)
                files[shard["index"]] = (shard["index_sha256"], shard["documents"] * 16)
                if "mask" in shard:
                    files[shard["mask"]] = (shard["mask_sha256"], -(-shard["tokens"] // 8))
    return files


def _verify(folder: Path, manifest: dict[str, Any], command: str) -> None:
    record = folder / VERIFIED
    try:
        known = json.loads(record.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        known = {}
    fresh = {}
    for name, (sha256, size) in described_files(manifest).items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"shards: {path} is missing; run {command} again")
        status = path.stat()
        if status.st_size != size:
            raise ValueError(f"shards: {path} is truncated or changed: must be {size} bytes, got {status.st_size}")
        fresh[name] = [sha256, status.st_size, status.st_mtime_ns]
        if known.get(name) != fresh[name] and sha256_file(path) != sha256:
            raise ValueError(f"shards: {path} has changed since it was made (SHA-256 differs from {MANIFEST})")
    if fresh != known:
        _remember(record, fresh)


def _remember(record: Path, checked: dict[str, list[Any]]) -> None:
    """Record the check. In a read-only folder that is impossible, so each start checks again."""
    try:
        write_json(record, checked)
    except PermissionError:
        return
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
