"""``tokenizer.json`` and ``tokenizer_config.json`` for Hugging Face, with the ids of the SentencePiece model.

SentencePiece's blank mark never enters these files: pieces are stored with real blanks, so that a typed U+2581 is an
unknown character and falls back to its three bytes, as in ``Tokenizer``. User-defined pieces are matched in the text
by both. Control pieces are *special* tokens here, as every Hugging Face tool expects: their names inside a text are
matched, unless it is called with ``split_special_tokens=True``; ``Tokenizer`` always reads them as plain text.
"""

import json
from pathlib import Path

from yaongi.data.chat import CHAT_TEMPLATE
from yaongi.data.files import write_atomically
from yaongi.data.tokenizer import CONTROL_PIECES, SPACE_MARK, USER_PIECES, Tokenizer


def export(tokenizer: Tokenizer, folder: Path) -> None:
    """Write both files into ``folder``."""
    write_atomically(folder / "tokenizer.json", hf_tokenizer_json(tokenizer).encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": CONTROL_PIECES[0],
        "unk_token": CONTROL_PIECES[1],
        "bos_token": CONTROL_PIECES[2],
        "eos_token": CONTROL_PIECES[3],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2).encode())


def hf_tokenizer_json(tokenizer: Tokenizer) -> str:
    """The text of ``tokenizer.json``."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as HfTokenizer

    pieces = [piece.replace(SPACE_MARK, " ") for piece in tokenizer.pieces()]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise ValueError(f"tokenizer: wanted {len(pieces)} different pieces, got {len(vocab)}")
    model = models.BPE(vocab, _merges(tokenizer, vocab), unk_token=CONTROL_PIECES[1], byte_fallback=True)
    result = HfTokenizer(model)
    result.normalizer = normalizers.NFC()  # changes nothing on text that Python has normalised
    result.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    result.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in CONTROL_PIECES])
    result.add_tokens([AddedToken(piece, normalized=False) for piece in USER_PIECES])
    return result.to_str(pretty=False)


def _merges(tokenizer: Tokenizer, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a learnt piece of two others, in the order of the piece's id, which is its rank."""
    fixed = set(CONTROL_PIECES) | set(USER_PIECES)
    learnt = {piece for piece, i in vocab.items() if piece not in fixed and not tokenizer.is_byte(i)}
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(learnt, key=vocab.__getitem__)
        for cut in range(1, len(piece))
        if piece[:cut] in learnt and piece[cut:] in learnt
    ]
