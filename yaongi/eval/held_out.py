"""Bits per byte of a model on the held-out rows of a folder of tokens, by domain."""

from collections.abc import Callable
from pathlib import Path

import torch

from yaongi.data.loader import HeldOut, Loader
from yaongi.eval.bits_per_byte import Logits, bits_per_byte, nats


def held_out_rows(
    folder: Path, tokenizer_hash: str, row_tokens: int, rows: int, warn: Callable[[str], None]
) -> dict[str, HeldOut]:
    """Read up to `rows` held-out rows per domain. A domain whose text doesn't fill one is left out, with a warning.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the tokens were made with another tokenizer, or a file is damaged.
    """
    loader = Loader(folder, row_tokens=row_tokens, batch_rows=1, tokenizer_hash=tokenizer_hash)
    found = {}
    for domain in loader.domains:
        try:
            found[domain] = loader.held_out(domain, rows)
        except ValueError as error:
            warn(f"no bits per byte of {domain}: {error}")
    return found


def held_out_bits(model: Logits, rows: dict[str, HeldOut], device: torch.device) -> dict[str, float]:
    """Return the bits per byte of each domain."""
    return {
        domain: bits_per_byte(nats(model, part, device=device), int(part.text_bytes.sum()))
        for domain, part in rows.items()
    }
