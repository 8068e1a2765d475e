"""Bits per byte on held-out text, a measure that doesn't depend on the tokenizer.

It is the sum of the nats of all predicted tokens, divided by ln 2 and by the UTF-8 bytes of these tokens. Not counted
are the EOS tokens that end documents, and the first token of a row or document, which nothing predicts.
"""

import math

import numpy as np
import torch
from torch.nn.functional import pad

from yaongi.data.row_loader import HeldOut
from yaongi.eval.rows.batches import to_device, token_scores
from yaongi.model import Yaongi


@torch.no_grad()
def nats(model: Yaongi, rows: HeldOut, *, device: torch.device, rows_at_once: int = 1) -> float:
    """Return the nats of all predicted tokens of `rows`, summed in float64; each is scored as a continuation's are."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(rows.input_ids), rows_at_once):
        part = slice(start, start + rows_at_once)
        ids = rows.input_ids[part]
        places = pad(rows.predicted[part, 1:], (0, 1)).flatten().nonzero().squeeze(1)  # what predicts a token
        hidden = model.hidden_states(ids.to(device), rows.document_ids[part].to(device)).flatten(0, 1)
        index = np.arange(len(places))
        targets = ids.flatten()[places + 1].to(device)
        values, _ = token_scores(model, hidden[places.to(device)], to_device(index, device), targets, index)
        total -= values.double().sum()
    return float(total)


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Return `nats` / ln 2 / `text_bytes`. Raises ValueError if there is no text."""
    if text_bytes < 1:
        raise ValueError(f"bits_per_byte: text_bytes must be 1 or more, got {text_bytes}")
    return nats / math.log(2) / text_bytes
