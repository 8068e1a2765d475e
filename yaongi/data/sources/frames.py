"""Decompressing .bz2, .xz and .zst, whose own readers take an early end, or garbage behind the end, for the end."""

import bz2
import io
import lzma
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_CHUNK = 1 << 15


class Frames(io.RawIOBase):
    """The content of compressed frames that follow one another; each must be whole."""

    def __init__(self, file: IO[bytes], start: Callable[[], Any], *, padded: bool = False) -> None:
        """Read `file`; `start` gives a decompressor for one frame, with `decompress`, `eof` and `unused_data`.

        Args:
            padded: zeros may stand behind a frame.
        """
        self._file, self._start, self._padded = file, start, padded
        self._first = True
        self._frame: Any = None
        self._packed, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill `buffer` with what content there is. Raises EOFError if the file is damaged."""
        while not self._content:
            packed = self._packed or self._file.read(_CHUNK)
            self._packed = b""
            if self._padded and self._frame is None and not self._first:
                filled, packed = len(packed), packed.lstrip(b"\0")
                if filled and not packed:
                    continue
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
            self._frame, self._first = self._start(), False
        try:
            content = self._frame.decompress(packed)
        except Exception as error:
            if "too much memory" in str(error):
                raise EOFError(
                    "its window is larger than 128 MB: compress it again with zstd --long=27 or less"
                ) from error
            raise EOFError(f"its compressed data is damaged ({error})") from error
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return content


def open_bz2(file: IO[bytes]) -> IO[bytes]:
    """Return a reader of a .bz2 file's content."""
    return io.BufferedReader(Frames(file, bz2.BZ2Decompressor))


def open_xz(file: IO[bytes]) -> IO[bytes]:
    """Return a reader of the content of a .xz file, whose streams may be padded with zeros."""
    return io.BufferedReader(Frames(file, lzma.LZMADecompressor, padded=True))


def open_zst(file: IO[bytes]) -> IO[bytes]:
    """Return a reader of a .zst file's content."""
    import zstandard

    return io.BufferedReader(Frames(file, zstandard.ZstdDecompressor().decompressobj))
