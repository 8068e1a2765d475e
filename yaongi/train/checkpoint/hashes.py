"""The SHA-256 of every file of a checkpoint, taken while it is written; `yaongi.files` checks it before it is read.

They stand in `SHA256SUMS`, so `sha256sum -c SHA256SUMS` checks a checkpoint too.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from yaongi.files import SUMS, sha256_file, write_atomically

_PART = ".sha256"  # beside a file, until the first process has gathered them all


class HashingWriter(FileSystemWriter):
    """torch's writer of checkpoints that hashes what it writes; the first process adds `texts` and `SHA256SUMS`."""

    def __init__(self, path: Path, texts: dict[str, bytes]) -> None:
        """Prepare to write.

        Args:
            texts: content of further files of the checkpoint, by name.
        """
        super().__init__(path)  # one thread: with more, an error in one may go unnoticed
        self.fs = _HashingFileSystem()
        self._texts = texts

    def finish(self, metadata: Any, results: Any) -> None:
        """Write the metadata, `texts` and `SHA256SUMS`, when all processes have written their files."""
        super().finish(metadata, results)
        folder = Path(self.path)
        parts = sorted(folder.glob(f"*{_PART}"))
        # the metadata file is small, and renamed after it is written
        sums = {part.name.removesuffix(_PART): part.read_text() for part in parts if ".metadata" not in part.name}
        sums[".metadata"] = sha256_file(folder / ".metadata")
        for name, content in self._texts.items():
            write_atomically(folder / name, content)
            sums[name] = hashlib.sha256(content).hexdigest()
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        write_atomically(folder / SUMS, lines.encode())
        for part in parts:
            part.unlink()


class _HashingFileSystem(FileSystem):
    """Files whose hash is put beside them when they are complete."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            hashed = _HashingStream(cast("IO[bytes]", stream))
            yield hashed if mode == "wb" else stream
        if mode == "wb":
            write_atomically(Path(f"{path}{_PART}"), hashed.hexdigest().encode())


class _HashingStream:
    """A file open for writing that hashes what passes; it can't seek."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._hash = stream, hashlib.sha256()
        self.fileno, self.tell, self.flush, self.close = stream.fileno, stream.tell, stream.flush, stream.close

    def write(self, data: Any) -> int:
        """Write bytes, and hash them."""
        self._hash.update(data)
        return self._stream.write(data)

    def hexdigest(self) -> str:
        """Return the hash of all that was written."""
        return self._hash.hexdigest()
