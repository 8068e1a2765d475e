"""The tokenizer: SentencePiece BPE, lossless up to NFC.

It adds two things to SentencePiece.

* Python first normalises text to NFC, so that a syllable takes the same tokens in composed and decomposed form.
* SentencePiece writes a blank as U+2581 ("▁") and could not tell a typed U+2581 from a blank. A typed one is therefore
  encoded as its three UTF-8 bytes, the pieces `<0xE2> <0x96> <0x81>`, and nothing merges across it. Decoding needs no
  special case, and `tokenizer.json` (see `hf_tokenizer`) gives the same ids.
"""

import hashlib
import io
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from yaongi.data.hf_tokenizer import write_hf_files
from yaongi.data.pieces import CONTROL_PIECES, SPACE_MARK, USER_PIECES
from yaongi.data.text import normalize
from yaongi.files import write_atomically

_CONTROL_OPTIONS: dict[str, Any] = {
    **{f"{name}_id": number for number, name in enumerate(("pad", "unk", "bos", "eos"))},
    **{f"{piece[2:5]}_piece": piece for piece in CONTROL_PIECES},
}

MODEL_FILE = "tokenizer.model"

_MARK_BYTES = ("<0xE2>", "<0x96>", "<0x81>")

_MAX_SENTENCE_CHARACTERS = 1 << 20

_TRAINER_THREADS = 16  # recorded in the model file, so fixed: with the number of cores the file would differ by machine


class Tokenizer:
    """Text to ids and back. Ids 0 to 3 are pad, unk, bos and eos; their names inside a text are plain text."""

    def __init__(self, model: bytes) -> None:
        """Load a model.

        Args:
            model: the bytes of a SentencePiece model trained by `train_tokenizer`.

        Raises:
            ValueError: the model has other control pieces.
        """
        self.model = model
        self.hash = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = tuple(self._processor.id_to_piece(i) for i in range(4))
        if pieces != CONTROL_PIECES:
            raise ValueError(f"tokenizer: pieces 0 to 3 must be {CONTROL_PIECES}, got {pieces}")
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = range(4)
        self.vocab_size: int = self._processor.vocab_size()
        self._mark_ids = [self.piece_to_id(piece) for piece in _MARK_BYTES]
        self._texts: dict[int, str] = {}  # of single tokens, which a stream asks for again and again

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read `tokenizer.model` at `path`, or in the folder `path`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a SentencePiece model, or one with other control pieces.
        """
        path = Path(path)
        file = path / MODEL_FILE if path.is_dir() else path
        if not file.is_file():
            made = f"python -m yaongi.data tokenizer --out {shlex.quote(str(path))}"
            raise FileNotFoundError(f"tokenizer: no {MODEL_FILE} at {path}; train one with {made}")
        try:
            return cls(file.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"tokenizer: {file} is not a SentencePiece model ({error})") from error

    @classmethod
    def of_model(cls, folder: Path) -> "Tokenizer":
        """Read the tokenizer in a model folder. Raises FileNotFoundError if it holds none: another would not fit."""
        if not (folder / MODEL_FILE).is_file():
            wanted = f"folder must hold {MODEL_FILE}, the tokenizer that the model was trained with"
            raise FileNotFoundError(f"tokenizer: {wanted}, got {folder}")
        return cls.load(folder)

    def save(self, folder: str | Path, *, chat: bool = False) -> None:
        """Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json` into `folder`.

        Args:
            chat: whether the folder is that of a model tuned on chats (see `hf_tokenizer`); the ids are the same.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pieces = self.pieces()
        byte_pieces = [piece for i, piece in enumerate(pieces) if self.is_byte(i)]
        write_hf_files(pieces, byte_pieces, folder, chat=chat)
        write_atomically(folder / MODEL_FILE, self.model)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of `text`, normalised to NFC. Raises ValueError for a lone surrogate."""
        text = normalize(text)
        ids = self._encode_marks(text) if SPACE_MARK in text else self._processor.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Iterable[str], *, bos: bool = False, eos: bool = False) -> list[list[int]]:
        """Encode each text, on this thread. Processes are faster: see `stages.tokenize_sources`."""
        return [self.encode(text, bos=bos, eos=eos) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`. Control pieces give no text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        if len(ids) == 1:
            only = int(ids[0])
            if only not in self._texts:
                self._texts[only] = self._decode([only])
            return self._texts[only]
        return self._decode([int(i) for i in ids])

    def _decode(self, plain: list[int]) -> str:
        if plain and not 0 <= min(plain) <= max(plain) < self.vocab_size:
            wrong = next(i for i in plain if not 0 <= i < self.vocab_size)
            raise ValueError(f"tokenizer: ids must be 0 to {self.vocab_size - 1}, got {wrong}")
        return self._processor.decode([i for i in plain if i > self.eos_id])

    def piece_to_id(self, piece: str) -> int:
        """Return the id of a piece as SentencePiece writes it: `<|im_start|>`, `▁the`. KeyError if there is none."""
        found = self._processor.piece_to_id(piece)
        if self._processor.id_to_piece(found) != piece:
            raise KeyError(f"tokenizer: no piece {piece!r}")
        return found

    def pieces(self) -> list[str]:
        """Return all pieces in the order of their ids, as SentencePiece writes them."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def scores(self) -> list[float]:
        """Return the score of each piece, by which SentencePiece chooses what to merge first."""
        return [self._processor.get_score(i) for i in range(self.vocab_size)]

    def kinds(self) -> list[str]:
        """Return what each piece is: unknown, control, byte, user_defined or normal."""

        def kind(token: int, piece: str) -> str:
            if self._processor.is_unknown(token):
                return "unknown"
            if self._processor.is_control(token):
                return "control"
            if self.is_byte(token):
                return "byte"
            return "user_defined" if piece in USER_PIECES else "normal"

        return [kind(token, piece) for token, piece in enumerate(self.pieces())]

    def is_byte(self, token: int) -> bool:
        """Return whether `token` is one of the 256 byte pieces."""
        return self._processor.is_byte(token)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for, in UTF-8 but for a byte piece; none for a control piece."""
        piece = self._processor.id_to_piece(token)
        if self.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return b"" if token <= self.eos_id else piece.replace(SPACE_MARK, " ").encode()

    @property
    def byte_lengths(self) -> NDArray[np.int32]:
        """UTF-8 bytes of text that each id stands for: (vocab_size,). Control pieces stand for none.

        The sum over a text's ids is the number of its UTF-8 bytes, the divisor of bits per byte.
        """
        return np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)], np.int32)

    def _encode_marks(self, text: str) -> list[int]:
        first, *rest = map(self._processor.encode, text.split(SPACE_MARK))
        for part in rest:
            first += self._mark_ids + part
        return first


def train_tokenizer(texts: Iterable[str], vocab_size: int = 32768, say: Callable[[str], None] = print) -> Tokenizer:
    """Train a tokenizer on documents; the caller mixes the domains (`sources.sample`).

    Args:
        texts: documents, which are iterated over again if they are too little for `vocab_size` pieces.
        vocab_size: number of pieces; 367 of them are fixed (control, user-defined and byte pieces). If the text is too
            little for them, there are as many as it gives, in steps of 64, and a line says so.

    Raises:
        ValueError: `vocab_size` is out of range or smaller than the text's characters need, or there is no text.
    """
    if not 512 <= vocab_size <= 65536:
        raise ValueError(f"tokenizer: vocab_size must be 512 to 65536, got {vocab_size}")
    texts = list(texts) if iter(texts) is texts else texts
    try:
        return _train(texts, vocab_size)
    except _TooLittleText as error:
        most = error.pieces // 64 * 64 if error.pieces >= 512 else error.pieces
        say(f"tokenizer: {most:,} pieces, not {vocab_size:,}: the text is too little for more than {error.pieces:,}")
        return _train(texts, most)


class _TooLittleText(Exception):
    """The text does not give as many pieces as were asked for, but `pieces`."""

    def __init__(self, pieces: int) -> None:
        super().__init__(pieces)
        self.pieces = pieces


def _train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    model = io.BytesIO()
    failed: list[Exception] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, failed),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=4 * _MAX_SENTENCE_CHARACTERS,
            user_defined_symbols=list(USER_PIECES),
            **_CONTROL_OPTIONS,
            num_threads=_TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failed:
            raise failed[0] from None
        raise _explained(str(error), vocab_size) from error
    return Tokenizer(model.getvalue())


def _explained(error: str, vocab_size: int) -> Exception:
    """Return the trainer's error as one of ours: it tells its numbers in a sentence alone."""
    if too_many := re.search(r"size too high .* <= (\d+)", error):
        return _TooLittleText(int(too_many[1]))
    if too_few := re.search(r"smaller than required_chars. \d+ vs (\d+)", error):
        return ValueError(f"tokenizer: vocab_size must be at least {too_few[1]} for this text, got {vocab_size}")
    if "sentences_.empty()" in error:
        return ValueError("tokenizer: there must be text to train on, got none")
    return ValueError(f"tokenizer: training failed: {' '.join(error.split())}")


def _sentences(texts: Iterable[str], failed: list[Exception]) -> Iterator[str]:
    """Yield documents in NFC, cut to the trainer's largest length, without NUL: the trainer skips text that has one.

    An error of `texts` is added to `failed`: the trainer turns it into one of its own.
    """
    try:
        for text in texts:
            text = normalize(text).replace("\0", "")
            for start in range(0, len(text), _MAX_SENTENCE_CHARACTERS):
                yield text[start : start + _MAX_SENTENCE_CHARACTERS]
    except Exception as error:
        failed.append(error)
        raise
