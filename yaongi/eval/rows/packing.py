"""Token sequences packed into rows of one length, so that hardly any position of a forward pass is padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Pack sequences into rows by best fit, the longest first; the same lengths always give the same rows.

    Args:
        lengths: tokens of each sequence, 1 to `row_tokens`.

    Returns:
        The sequences of each row, as indices into `lengths`.

    Raises:
        ValueError: a sequence is empty, or longer than a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted, of the rows that have room
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if not 1 <= length <= row_tokens:
            raise ValueError(f"pack: sequences must be 1 to {row_tokens} tokens long, got {length}")
        place = bisect_left(room, (length, 0))
        if place == len(room):
            free, row = row_tokens, len(rows)
            rows.append([])
        else:
            free, row = room.pop(place)
        rows[row].append(index)
        if free > length:
            insort(room, (free - length, row))
    return rows
