"""Bits per byte of a model by domain, on the held-out rows of a folder of tokens or on texts."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from yaongi.data.loader import Loader
from yaongi.data.row_loader import HeldOut, RowLoader
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.bits_per_byte import bits_per_byte, nats
from yaongi.model import Yaongi

_TOKENS_AT_ONCE = 1 << 14  # read by the model in a pass


def held_out_rows(
    folder: Path, tokenizer_hash: str, row_tokens: int, rows: int, warn: Callable[[str], None]
) -> dict[str, HeldOut]:
    """Read held-out rows of each domain of a folder as `rows_of_domains` does.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the tokens were made with another tokenizer, or a file is damaged.
    """
    return rows_of_domains(
        Loader(folder, row_tokens=row_tokens, batch_rows=1, tokenizer_hash=tokenizer_hash), rows, warn
    )


def rows_of_domains(loader: RowLoader, rows: int, warn: Callable[[str], None]) -> dict[str, HeldOut]:
    """Read `rows` held-out rows per domain, 0: all. One whose text doesn't fill a row is left out, with a warning."""
    found = {}
    for domain in loader.measured:
        try:
            found[domain] = loader.held_out(domain, rows)
        except ValueError as error:
            warn(f"no bits per byte of {domain}: {error}")
    return found


def text_rows(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer, row_tokens: int) -> dict[str, HeldOut]:
    """Cut texts into rows, by domain. The first token of a row is read but not counted, as in held-out rows.

    Args:
        texts: (domain, text) of each; those of one domain are separate documents.

    Raises:
        ValueError: a text has fewer than two tokens, or is none in Unicode.
    """
    cut: dict[str, list[torch.Tensor]] = defaultdict(list)
    for domain, text in texts:
        ids = torch.tensor(tokenizer.encode(text))
        if len(ids) < 2:
            raise ValueError(f"bpb: a text must have 2 tokens or more, got {len(ids)} in {domain}")
        cut[domain] += ids.split(row_tokens)
    sizes = torch.from_numpy(tokenizer.byte_lengths).long()
    found = {}
    for domain, rows in cut.items():
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), tokenizer.pad_id)
        documents = torch.ones(ids.shape, dtype=torch.int32)  # the padding's; that of the text is 0
        for number, row in enumerate(rows):
            ids[number, : len(row)], documents[number, : len(row)] = row, 0
        predicted = documents == 0
        predicted[:, 0] = False
        found[domain] = HeldOut(ids, documents, predicted, (sizes[ids] * predicted).sum(1))
    return found


def held_out_bits(model: Yaongi, rows: dict[str, HeldOut], device: torch.device) -> dict[str, float]:
    """Return the bits per byte of each domain."""
    return {
        domain: bits_per_byte(
            nats(model, part, device=device, rows_at_once=max(1, _TOKENS_AT_ONCE // part.input_ids.shape[1])),
            int(part.text_bytes.sum()),
        )
        for domain, part in rows.items()
    }
