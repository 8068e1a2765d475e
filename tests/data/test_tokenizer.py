"""The tokenizer restores every text, and Hugging Face's file gives the same ids."""

import json
import random
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from texts import random_texts

from yaongi.data.chats.template import render_chat
from yaongi.data.pieces import CONTROL_PIECES, USER_PIECES
from yaongi.data.tokenizer import Tokenizer, train_tokenizer

EDGES = [
    "",
    "\n",
    "\n\n",
    "\n\n\n\n\n\n\n",
    "a\n\n\n b",
    "\t\tx\t",
    " ",
    "   ",
    "  leading and trailing  ",
    "ㅋㅋㅋㅋㅋ ㅠㅠ",
    "x² + ½ = ①",
    "ＡＢＣ　１２３",
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "line\r\nline\r\n",
    "\x00\x01\x07\x1b\x7f\x85\u200b\u2028",
    "\u2581",
    "a\u2581b \u2581\u2581 c\u2581",
    "\u2581 é \u2581é",
    "<0x41><0xE2>",
    "<s></s><unk><pad>",
    "\ufeffBOM",
    "\ufffd \u2047 ⁇",
    "e\u0301 \u1112\u1161\u11ab",
    "<|im_start|>user\n안녕<|im_end|>\n",
    "<|reserved_0|><|reserved_99|><|step|><|code|>",
    "\U0010ffff\ue000",
    "12345678901234567890",
    "한국어 문장입니다. 그리고 English가 섞여 있습니다.",
]


def random_strings(count: int) -> list[str]:
    """Return random strings from all of Unicode and from its difficult parts."""
    rng = random.Random(7)
    hard = [*" \n\t\r\u2581\u0301\u1100\u1161\u11a8abc01<|>_", "\n\n\n\n\n", "      ", "<|im_end|>", "<0x0A>", "ㅋㅋㅋ"]

    def character() -> str:
        kind = rng.random()
        if kind < 0.3:
            point = rng.randrange(0x110000 - 0x800)
            return chr(point if point < 0xD800 else point + 0x800)
        return chr(rng.randrange(0xAC00, 0xD7A4)) if kind < 0.5 else rng.choice(hard)

    return ["".join(character() for _ in range(rng.randrange(60))) for _ in range(count)]


@pytest.fixture(scope="module")
def hugging_face(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("text", EDGES, ids=ascii)
def test_edge_strings_come_back(tokenizer: Tokenizer, text: str) -> None:
    normal = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text)) == normal


def test_ten_thousand_random_strings_come_back_with_equal_ids(
    tokenizer: Tokenizer, hugging_face: tokenizers.Tokenizer
) -> None:
    lengths = tokenizer.byte_lengths
    for text in [*EDGES, *random_strings(10_000)]:
        normal = unicodedata.normalize("NFC", text)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == normal
        assert hugging_face.encode(normal, add_special_tokens=False).ids == ids, ascii(text)
        assert hugging_face.decode(ids, skip_special_tokens=False) == normal
        assert int(lengths[ids].sum()) == len(normal.encode())


def test_embedded_documents_have_equal_ids(tokenizer: Tokenizer, hugging_face: tokenizers.Tokenizer) -> None:
    from yaongi.data.sources.embedded.corpus import embedded_sources

    for source in embedded_sources():
        if source.split == "val":
            for text in source.documents():
                normal = unicodedata.normalize("NFC", text)
                assert hugging_face.encode(normal, add_special_tokens=False).ids == tokenizer.encode(text)


def test_fixed_pieces(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces()[:4] == list(CONTROL_PIECES)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 4096
    for piece in USER_PIECES:
        assert tokenizer.encode(piece) == [tokenizer.piece_to_id(piece)]
    assert len(tokenizer.encode("<|eos|>")) > 1, "a control piece's name inside a text is text"
    assert tokenizer.encode("a", bos=True, eos=True) == [2, *tokenizer.encode("a"), 3]
    assert len(tokenizer.encode("2024")) == 4, "digits are split"
    with pytest.raises(KeyError):
        tokenizer.piece_to_id("no such piece at all")


def test_decomposed_korean_costs_the_same(tokenizer: Tokenizer) -> None:
    text = "한글은 아름답다"
    assert tokenizer.encode(unicodedata.normalize("NFD", text)) == tokenizer.encode(text)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_lone_surrogates_are_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(ValueError, match="lone surrogates"):
        tokenizer.encode(text)


def test_decode_refuses_ids_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="0 to 4095, got 4096"):
        tokenizer.decode([5, 4096])
    with pytest.raises(ValueError, match="got -1"):
        tokenizer.decode([-1])
    assert tokenizer.decode([2, *tokenizer.encode("가"), 3, 0]) == "가"


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash == tokenizer.hash
    assert again.encode_batch(["가", "b"], eos=True) == tokenizer.encode_batch(["가", "b"], eos=True)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|eos|>"


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path)


def test_training_is_deterministic() -> None:
    texts = random_texts(1, 300)
    first, second = (train_tokenizer(texts, 512) for _ in range(2))
    assert first.hash == second.hash


def test_training_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="512 to 65536"):
        train_tokenizer(["a"], 100)
    with pytest.raises(ValueError, match="must be text to train on, got none"):
        train_tokenizer([], 4096)


def test_transformers_reads_the_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "안녕하세요  x²\n\n\tcode \u2581"
    assert fast(text)["input_ids"] == tokenizer.encode(text)
    assert fast.decode(tokenizer.encode(text)) == text
    assert (fast.pad_token_id, fast.eos_token_id, fast.padding_side) == (0, 3, "left")
    messages = [{"role": "user", "content": "안녕?"}, {"role": "assistant", "content": "네."}]
    assert fast.apply_chat_template(messages, tokenize=False) == render_chat(messages)


def test_trl_accepts_the_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Run TRL's own checks: turns never change by what follows, and the end of an answer is trained."""
    checks = pytest.importorskip("trl.chat_template_utils")
    tokenizer.save(tmp_path)
    fast = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert checks.is_chat_template_prefix_preserving(fast)
    assert checks.is_chat_template_stop_token_trained(fast)
    messages = [{"role": "user", "content": "안녕?"}, {"role": "assistant", "content": "네.\n"}]
    found = fast.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert fast.decode(trained) == "네.<|im_end|>"
