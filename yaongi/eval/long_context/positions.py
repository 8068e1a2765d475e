"""Bits per byte by position in the document: they fall as the context grows, and must not rise where rows are long."""

from dataclasses import replace
from itertools import pairwise

import torch

from yaongi.data.row_loader import HeldOut

EDGES = (256, 1024, 4096, 16384)  # between buckets of positions


def by_position(rows: HeldOut, token_bytes: torch.Tensor) -> dict[str, HeldOut]:
    """Return the same rows for each bucket of positions, of which only the tokens there count.

    A token's position is the number of its document's tokens before it in the row. Buckets without tokens are left out.

    Args:
        token_bytes: (V,), UTF-8 bytes of each id.
    """
    length = rows.input_ids.shape[1]
    place = torch.arange(length)
    begins = torch.ones_like(rows.predicted)
    begins[:, 1:] = rows.document_ids[:, 1:] != rows.document_ids[:, :-1]
    position = place - torch.where(begins, place, 0).cummax(1).values
    edges = [0, *(edge for edge in EDGES if edge < length), length]
    found = {}
    for low, high in pairwise(edges):
        counted = rows.predicted & (position >= low) & (position < high)
        if counted.any():
            sizes = (token_bytes.long()[rows.input_ids] * counted).sum(1)
            found[f"{low}-{high - 1}"] = replace(rows, predicted=counted, text_bytes=sizes)
    return found
