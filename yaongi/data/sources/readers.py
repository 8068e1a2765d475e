"""Reading documents from the formats of `files`, on disk or in any binary stream."""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

from yaongi.data.chats.template import render_chat
from yaongi.data.sources.files import TABLES, file_format
from yaongi.data.sources.frames import open_bz2, open_xz, open_zst
from yaongi.data.sources.json_array import array_items
from yaongi.data.sources.tally import BAD_ROWS
from yaongi.data.text import pieces, refuse_surrogates

TEXT_FIELDS = ("text", "content", "messages")
Row = dict[str, Any] | ValueError  # an error says which row is bad and why
LONGEST = 4_000_000
_TXT_DOCUMENT_CHARACTERS = 1 << 16
_LINE = 16  # characters that a JSON line may have for each byte of the longest document


@dataclass(frozen=True)
class Reading:
    """How files are read; each of these can change the documents."""

    text_field: str = ""  # field of the rows with the text, a.b for b in object a; none: text, content or messages
    encoding: str = "utf-8"  # encoding of text files and JSON lines, such as cp949
    max_document_bytes: int = LONGEST  # a longer text is cut into several documents
    bad_rows: float = BAD_ROWS  # share of a source's rows that may be bad and are skipped; one in any case

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError for one that doesn't fit."""
        if self.max_document_bytes < 1000:
            raise ValueError(f"data: max_document_bytes must be 1000 or more, got {self.max_document_bytes}")
        if not 0 <= self.bad_rows <= 1:
            raise ValueError(f"data: bad_rows must be a share from 0 to 1, got {self.bad_rows}")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"data: encoding must be one that Python knows, got {self.encoding!r}") from None

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that may hold a row's text."""
        return (self.text_field,) if self.text_field else TEXT_FIELDS


PLAIN = Reading()


def read_texts(path: Path, reading: Reading = PLAIN) -> Iterator[str | ValueError]:
    """Yield `row_text` of each row. A .txt is one row, or several of about 64k characters if it is longer.

    Raises:
        ValueError: compression or encoding is broken, or a .parquet has none of the fields.
    """
    with path.open("rb") as file:
        rows = read_rows(file, str(path), reading.fields, encoding=reading.encoding, longest=reading.max_document_bytes)
        for number, row in enumerate(rows):
            fields = ("text",) if file_format(path.name) == ".txt" else reading.fields
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
        value = _value(row, field)
        text = render_chat(value) if isinstance(value, list) else value
        if isinstance(text, str) and text and not text.isspace():
            refuse_surrogates(text)
            return text
        empty |= isinstance(text, str)
    if empty:
        return ""
    there = {field: _value(row, field) for field in fields if field.partition(".")[0] in row}
    got = [f"{field} {'null' if value is None else type(value).__name__}" for field, value in there.items()]
    raise ValueError(_no_text(fields, ", ".join(got) or f"fields {sorted(row)} (--text-field names another)"))


def _value(row: Mapping[str, Any], field: str) -> Any:
    """Return what a row holds in a field; `a.b` is field b of the object in field a."""
    if field in row or "." not in field:
        return row.get(field)
    first, _, rest = field.partition(".")
    inner = row.get(first)
    return _value(inner, rest) if isinstance(inner, Mapping) else None


def _no_text(fields: Sequence[str], got: str) -> str:
    return f"one of {list(fields)} must hold text, got {got}"


def read_rows(
    file: IO[bytes],
    name: str,
    fields: Sequence[str] | None,
    start: int = 0,
    *,
    encoding: str = "utf-8",
    longest: int = LONGEST,
) -> Iterator[Row]:
    """Yield the rows of a file from number `start` on; for a row that is no JSON object, the error.

    Args:
        name: its ending gives the format.
        fields: columns to read of a parquet file; None: all. Other formats give all fields.
        encoding: of text files and JSON lines.
        longest: bytes of text that a row may need; a JSON line of sixteen times as many characters is an error.

    Raises:
        ValueError: the content does not have the format; the message names the file.
    """
    kind = file_format(name)
    if kind == ".parquet":
        yield from _parquet_rows(file, name, fields, start)
        return
    try:
        utf8 = codecs.lookup(encoding).name == "utf-8"
        lines = io.TextIOWrapper(_decompressed(file, name), encoding="utf-8-sig" if utf8 else encoding, newline="")
        if kind == ".txt":
            cut = iter(lambda: lines.readline(4 * longest), "")
            unix = (line[:-2] + "\n" if line.endswith("\r\n") else line for line in cut)
            yield from islice(({"text": text} for text in pieces(unix, _TXT_DOCUMENT_CHARACTERS)), start, None)
        elif kind in TABLES:
            yield from islice(_table_rows(lines, kind, longest), start, None)
        else:
            yield from islice(_json_rows(lines, name, start, _LINE * longest), start, None)
    except UnicodeError as error:
        another = "cp949" if utf8 else "utf-8"
        raise ValueError(f"data: {name} cannot be read as {encoding}; try --encoding {another} ({error})") from error
    except (EOFError, csv.Error, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"data: {name} cannot be read: {error}") from error


def _decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    ending = Path(name.lower()).suffix
    if ending == ".xz":
        return open_xz(file)
    if ending == ".gz":
        return cast(IO[bytes], gzip.open(file))
    if ending == ".bz2":
        return open_bz2(file)
    if ending == ".zst":
        return open_zst(file)
    return file


def _lines(file: io.TextIOWrapper, longest: int) -> Iterator[str | None]:
    """Yield the lines that are not blank; None for one of more than `longest` characters, which is never held."""
    while line := file.readline(longest):
        if len(line) < longest or line.endswith("\n"):
            if not line.isspace():
                yield line
            continue
        while line and not line.endswith("\n"):
            line = file.readline(longest)
        yield None


def _json_rows(file: io.TextIOWrapper, name: str, start: int, longest: int) -> Iterator[Row]:
    """Yield the rows of JSON lines, or of a .json file that is an array."""
    lines = _lines(file, longest)
    first = next(lines, "")
    if first and first.lstrip().startswith("[") and ".json" in Path(name.lower()).suffixes:
        yield from _array_rows(file, first, name, longest)
        return
    for number, line in enumerate(chain([first], lines) if first != "" else ()):
        if number < start:
            yield {}
            continue
        if line is None:
            yield ValueError(f"data: {name}, row {number}: line too long (--max-document-bytes allows longer ones)")
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield ValueError(f"data: {name}, row {number}: not JSON ({error})")
            continue
        yield _object(record, name, number)


def _array_rows(file: io.TextIOWrapper, start: str, name: str, longest: int) -> Iterator[Row]:
    try:
        for number, record in enumerate(array_items(file, start, longest)):
            yield _object(record, name, number)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeError):
            raise
        raise ValueError(f"data: {name} cannot be read: {error}") from error


def _table_rows(file: io.TextIOWrapper, kind: str, longest: int) -> Iterator[Row]:
    csv.field_size_limit(_LINE * longest)
    yield from csv.DictReader(file, delimiter="," if kind == ".csv" else "\t", restkey="", strict=True)


def _object(record: Any, name: str, number: int) -> Row:
    if isinstance(record, dict):
        return record
    return ValueError(f"data: {name}, row {number}: must be a JSON object, got {type(record).__name__}")


def _parquet_rows(file: IO[bytes], name: str, fields: Sequence[str] | None, start: int) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file, page_checksum_verification=True)
        names = table.schema_arrow.names
        wanted = names if fields is None else fields
        columns = [field for field in wanted if field in names or field.partition(".")[0] in names]
        if not columns:
            got = f"fields {names} (--text-field names another)"
            raise ValueError(f"data: {name}: {_no_text(wanted, got)}")
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
