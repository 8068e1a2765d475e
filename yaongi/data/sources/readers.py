"""Reading documents from the formats of `files`, on disk or in any binary stream."""

import gzip
import io
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from yaongi.data.chat import render_chat
from yaongi.data.sources.files import file_format
from yaongi.data.sources.frames import open_bz2, open_zst
from yaongi.data.text import pieces, refuse_surrogates

TEXT_FIELDS = ("text", "content", "messages")
Row = dict[str, Any] | ValueError  # an error says which row is bad and why
_TXT_DOCUMENT_CHARACTERS = 1 << 16


def read_texts(path: Path, fields: Sequence[str] = TEXT_FIELDS) -> Iterator[str | ValueError]:
    """Yield `row_text` of each row. A .txt is one row, or several of about 64k characters if it is longer.

    Raises:
        ValueError: compression or UTF-8 is broken, or a .parquet has none of `fields`.
    """
    with path.open("rb") as file:
        for number, row in enumerate(read_rows(file, str(path), fields)):
            yield row_text(row, fields, f"{path}, row {number}")


def row_text(row: Row, fields: Sequence[str], where: str) -> str | ValueError:
    """Return the first of `fields` that holds text, or chat messages, which are rendered; an empty text if all are.

    Of a bad row, without text or with a lone surrogate, return the error, which says `where` it is.
    """
    if isinstance(row, ValueError):
        return row
    try:
        return _text(row, fields)
    except ValueError as error:
        return ValueError(f"data: {where}: {error}")


def _text(row: Mapping[str, Any], fields: Sequence[str]) -> str:
    empty = False
    for field in fields:
        value = row.get(field)
        text = render_chat(value) if isinstance(value, list) else value
        if isinstance(text, str) and text and not text.isspace():
            refuse_surrogates(text)
            return text
        empty |= isinstance(text, str)
    if empty:
        return ""
    there = {field: row[field] for field in fields if field in row}
    got = [f"{field} {'null' if value is None else type(value).__name__}" for field, value in there.items()]
    raise ValueError(f"one of {list(fields)} must hold text, got {', '.join(got) or f'fields {sorted(row)}'}")


def read_rows(file: IO[bytes], name: str, fields: Sequence[str], start: int = 0) -> Iterator[Row]:
    """Yield the rows of a file from number `start` on; for a row that is no JSON object, the error.

    Args:
        name: its ending gives the format.
        fields: columns to read of a parquet file; other formats give all fields.

    Raises:
        ValueError: the content does not have the format; the message names the file.
    """
    kind = file_format(name)
    if kind == ".parquet":
        yield from _parquet_rows(file, name, fields, start)
        return
    try:
        lines = io.TextIOWrapper(_decompressed(file, name), encoding="utf-8-sig", newline="")
        if kind == ".txt":
            unix = (line[:-2] + "\n" if line.endswith("\r\n") else line for line in lines)
            yield from islice(({"text": text} for text in pieces(unix, _TXT_DOCUMENT_CHARACTERS)), start, None)
        else:
            yield from islice(_json_rows(lines, name, start), start, None)
    except _broken() as error:
        raise ValueError(f"data: {name} cannot be read: {error}") from error


def _broken() -> tuple[type[Exception], ...]:
    """Return the errors that decompressors and UTF-8 decoding raise for broken content."""
    import zlib

    return UnicodeDecodeError, EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error


def _decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    ending = Path(name.lower()).suffix
    if ending == ".xz":
        return lzma.open(file)
    if ending == ".gz":
        return cast(IO[bytes], gzip.open(file))
    if ending == ".bz2":
        return open_bz2(file)
    if ending == ".zst":
        return open_zst(file)
    return file


def _json_rows(lines: io.TextIOWrapper, name: str, start: int) -> Iterator[Row]:
    rows = (line for line in lines if line.strip())
    for number, line in enumerate(rows):
        if number < start:
            yield {}
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield ValueError(f"data: {name}, row {number}: not JSON ({error})")
            continue
        if not isinstance(record, dict):
            record = ValueError(f"data: {name}, row {number}: must be a JSON object, got {type(record).__name__}")
        yield record


def _parquet_rows(file: IO[bytes], name: str, fields: Sequence[str], start: int) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file, page_checksum_verification=True)
        columns = [field for field in fields if field in table.schema_arrow.names]
        if not columns:
            raise ValueError(
                f"data: {name}: one of {list(fields)} must be there, got fields {table.schema_arrow.names}"
            )
        first = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if first + rows > start:
                batches = table.iter_batches(256, row_groups=[group], columns=columns)
                yield from islice((r for b in batches for r in b.to_pylist()), max(0, start - first), None)
            first += rows
    except (pyarrow.ArrowInvalid, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # the disk's or the connection's; pyarrow's own is a plain one
        raise ValueError(f"data: {name} is not a whole parquet file ({' '.join(str(error).split())})") from error
