"""The items of a JSON array, read piece by piece: a .json file may be one array rather than a row per line."""

import json
from collections.abc import Iterator
from typing import Any, TextIO

_CHUNK = 1 << 20


def array_items(file: TextIO, start: str, longest: int) -> Iterator[Any]:
    """Yield the items of the array that begins in `start` and goes on in `file`.

    Args:
        longest: characters that an item may have.

    Raises:
        ValueError: it is no whole array, or an item is too long.
    """
    text, place = start.lstrip(), 1
    decode = json.JSONDecoder().raw_decode
    first = True
    while True:
        text, place = _skip_blanks(file, text, place)
        if text[place : place + 1] == "]":
            if (text[place + 1 :] + file.read(_CHUNK)).strip():
                raise ValueError("there is more behind its array")
            return
        if not first:
            if text[place : place + 1] != ",":
                raise ValueError("its array ends early" if place == len(text) else "its array lacks a comma")
            text, place = _skip_blanks(file, text, place + 1)
        first = False
        while True:
            try:
                item, end = decode(text, place)
                if end < len(text):  # a number may go on
                    break
            except ValueError as error:
                if len(text) - place > longest:
                    raise ValueError(f"an item of its array is not JSON, or too long ({error})") from error
            more = file.read(max(_CHUNK, len(text) - place))
            if not more:
                raise ValueError("its array ends early or is not JSON")
            text, place = text[place:] + more, 0
        yield item
        place = end


def _skip_blanks(file: TextIO, text: str, place: int) -> tuple[str, int]:
    """Return the text and the place of its next character that is no blank, reading on if need be."""
    while True:
        while place < len(text) and text[place] in " \t\r\n":
            place += 1
        if place < len(text):
            return text, place
        text, place = file.read(_CHUNK), 0
        if not text:
            return "", 0
