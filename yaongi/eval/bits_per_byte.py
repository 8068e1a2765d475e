"""Bits per byte on held-out text, a measure that doesn't depend on the tokenizer.

It is the sum of the nats of all predicted tokens, divided by ln 2 and by the UTF-8 bytes of these tokens. Not counted
are the EOS tokens that end documents, and the first token of a row or document, which nothing predicts.
"""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from yaongi.data.row_loader import HeldOut

Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids and document ids (B, L) → logits (B, L, V)
_POSITIONS_AT_ONCE = 1 << 14  # positions whose logits are cast to float32 together


@torch.no_grad()
def nats(model: Logits, rows: HeldOut, *, device: torch.device, rows_at_once: int = 1) -> float:
    """Return the nats of all predicted tokens of `rows`, summed in float64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(rows.input_ids), rows_at_once):
        part = slice(start, start + rows_at_once)
        ids = rows.input_ids[part].to(device)
        logits = model(ids, rows.document_ids[part].to(device))
        counted = rows.predicted[part, 1:].reshape(-1).to(device)
        predictions = logits[:, :-1].reshape(-1, logits.shape[-1])
        targets = ids[:, 1:].reshape(-1)
        for first in range(0, len(targets), _POSITIONS_AT_ONCE):
            some = slice(first, first + _POSITIONS_AT_ONCE)
            losses = cross_entropy(predictions[some].float(), targets[some], reduction="none")
            total += (losses.double() * counted[some]).sum()
    return float(total)


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Return `nats` / ln 2 / `text_bytes`. Raises ValueError if there is no text."""
    if text_bytes < 1:
        raise ValueError(f"bits_per_byte: text_bytes must be 1 or more, got {text_bytes}")
    return nats / math.log(2) / text_bytes
