"""Token sequences packed into rows of one length, so that hardly any position is padding."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from itertools import chain


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Pack sequences into rows by best fit; the same lengths always give the same rows.

    Two orders are tried, and the one with fewer rows wins: the longest first, which is good where short ones can fill
    the gaps; and long and short by turns, which is good where all are nearly as long.

    Args:
        lengths: tokens of each sequence, 1 to `row_tokens`.

    Returns:
        The sequences of each row, as indices into `lengths`.

    Raises:
        ValueError: a sequence is empty, or longer than a row.
    """
    wrong = next((length for length in lengths if not 1 <= length <= row_tokens), None)
    if wrong is not None:
        raise ValueError(f"pack: sequences must be 1 to {row_tokens} tokens long, got {wrong}")
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    half = len(lengths) // 2
    by_turns = list(chain.from_iterable(zip(longest_first, reversed(longest_first), strict=True)))[: 2 * half]
    by_turns += longest_first[half : len(lengths) - half]
    return min((_best_fit(order, lengths, row_tokens) for order in (longest_first, by_turns)), key=len)


def _best_fit(order: Iterable[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Put each sequence into the fullest row that has room for it, else into a new one."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted, of the rows that have room
    for index in order:
        length = lengths[index]
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
