"""`tokenizer.json` and `tokenizer_config.json` for Hugging Face, with the ids of the SentencePiece model.

These files don't contain SentencePiece's blank mark, U+2581: pieces are stored with real blanks. So a typed U+2581 is
an unknown character and falls back to its three bytes, as in `Tokenizer`. User-defined pieces are matched in the text
here and in `Tokenizer`. Control pieces are *special* tokens here, as every Hugging Face tool expects: their names
inside a text are matched, unless the tokenizer is called with `split_special_tokens=True`. `Tokenizer` always reads
them as plain text.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from yaongi.data.chat import CHAT_TEMPLATE
from yaongi.data.pieces import CONTROL_PIECES, SPACE_MARK, USER_PIECES
from yaongi.files import write_atomically


def write_hf_files(pieces: Sequence[str], byte_pieces: Collection[str], folder: Path) -> None:
    """Write both files into `folder`.

    Args:
        pieces: all pieces, by id.
        byte_pieces: those pieces that stand for one byte.
    """
    write_atomically(folder / "tokenizer.json", tokenizer_json(pieces, byte_pieces).encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": CONTROL_PIECES[0],
        "unk_token": CONTROL_PIECES[1],
        "bos_token": CONTROL_PIECES[2],
        "eos_token": CONTROL_PIECES[3],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2).encode())


def tokenizer_json(pieces: Sequence[str], byte_pieces: Collection[str]) -> str:
    """Return the text of `tokenizer.json`."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as HfTokenizer

    pieces = [piece.replace(SPACE_MARK, " ") for piece in pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise ValueError(f"tokenizer: pieces must be {len(pieces)} different ones, got {len(vocab)}")
    model = models.BPE(vocab, _merges(vocab, byte_pieces), unk_token=CONTROL_PIECES[1], byte_fallback=True)
    result = HfTokenizer(model)
    result.normalizer = normalizers.NFC()  # changes nothing in text that Python has normalised
    result.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    result.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in CONTROL_PIECES])
    result.add_tokens([AddedToken(piece, normalized=False) for piece in USER_PIECES])
    return result.to_str(pretty=False)


def _merges(vocab: dict[str, int], byte_pieces: Collection[str]) -> list[tuple[str, str]]:
    """Return every way to merge two learnt pieces into a third, in the order of the third's id, which is its rank."""
    learnt = set(vocab) - set(CONTROL_PIECES) - set(USER_PIECES) - set(byte_pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(learnt, key=vocab.__getitem__)
        for cut in range(1, len(piece))
        if piece[:cut] in learnt and piece[cut:] in learnt
    ]
