"""`tokenizer.json` and `tokenizer_config.json` for Hugging Face, with the ids of the SentencePiece model.

These files don't contain SentencePiece's blank mark, U+2581: pieces are stored with real blanks. So a typed U+2581 is
an unknown character and falls back to its three bytes, as in `Tokenizer`. User-defined pieces are matched in the text
here and in `Tokenizer`. Control pieces are *special* tokens here, as every Hugging Face tool expects: their names
inside a text are matched, unless the tokenizer is called with `split_special_tokens=True`. `Tokenizer` always reads
them as plain text.

Files for a model that was tuned on chats differ in three things. What opens and ends a turn is special too. An answer's
end is the tokenizer's EOS, the only one that trainers and many servers look for. And a message's header is encoded
apart from what follows, as in `chats.encode`; so is a role on a line of its own that begins a text.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from yaongi.data.chats.template import CHAT_TEMPLATE, ROLES
from yaongi.data.pieces import CONTROL_PIECES, END_OF_TURN, SPACE_MARK, START_OF_TURN, USER_PIECES
from yaongi.files import write_atomically, write_json


def write_hf_files(pieces: Sequence[str], byte_pieces: Collection[str], folder: Path, *, chat: bool = False) -> None:
    """Write both files into `folder`.

    Args:
        pieces: all pieces, by id.
        byte_pieces: those pieces that stand for one byte.
        chat: whether they are for a model that was tuned on chats.
    """
    write_atomically(folder / "tokenizer.json", tokenizer_json(pieces, byte_pieces, chat=chat).encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": CONTROL_PIECES[0],
        "unk_token": CONTROL_PIECES[1],
        "bos_token": CONTROL_PIECES[2],
        "eos_token": END_OF_TURN if chat else CONTROL_PIECES[3],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", config)


def tokenizer_json(pieces: Sequence[str], byte_pieces: Collection[str], *, chat: bool = False) -> str:
    """Return the text of `tokenizer.json`; arguments as in `write_hf_files`."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as HfTokenizer

    pieces = [piece.replace(SPACE_MARK, " ") for piece in pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise ValueError(f"tokenizer: pieces must be {len(pieces)} different ones, got {len(vocab)}")
    model = models.BPE(vocab, _merges(vocab, byte_pieces), unk_token=CONTROL_PIECES[1], byte_fallback=True)
    result = HfTokenizer(model)
    result.normalizer = normalizers.NFC()  # changes nothing in text that Python has normalised
    result.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = (*CONTROL_PIECES, START_OF_TURN, END_OF_TURN) if chat else CONTROL_PIECES
    result.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    result.add_tokens(
        [AddedToken(piece, normalized=True) for piece in USER_PIECES if piece not in special]
    )  # after NFC
    if chat:
        result.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\A({'|'.join(ROLES)})\n"), "isolated")
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
