"""Decompressing .bz2 and .zst, whose own readers take an early end, or garbage behind the end, for the end."""

import bz2
import io
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_CHUNK = 1 << 15


class Frames(io.RawIOBase):
    """The content of compressed frames that follow one another; each must be whole."""

    def __init__(self, file: IO[bytes], start: Callable[[], Any]) -> None:
        """Read `file`; `start` gives a decompressor for one frame, with `decompress`, `eof` and `unused_data`."""
        self._file, self._start = file, start
        self._frame: Any = None
        self._packed, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill `buffer` with what content there is. Raises EOFError if the file is damaged."""
        while not self._content:
            packed = self._packed or self._file.read(_CHUNK)
            if not packed and self._frame is None:
                return 0
            self._content = memoryview(self._unpack(packed))
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._content))
        target[:size], self._content = self._content[:size], self._content[size:]
        return size

    def _unpack(self, packed: bytes) -> bytes:
        if not packed:
            raise EOFError("it ends within its compressed data")
        if self._frame is None:
            self._frame = self._start()
        try:
            content = self._frame.decompress(packed)
        except Exception as error:
            raise EOFError(f"its compressed data is damaged ({error})") from error
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return content


def open_bz2(file: IO[bytes]) -> IO[bytes]:
    """Return a reader of a .bz2 file's content."""
    return io.BufferedReader(Frames(file, bz2.BZ2Decompressor))


def open_zst(file: IO[bytes]) -> IO[bytes]:
    """Return a reader of a .zst file's content."""
    import zstandard

    return io.BufferedReader(Frames(file, zstandard.ZstdDecompressor().decompressobj))
