"""Conversations as ids, with the mask of what is learnt: the one way for training, chat, serving and evaluation.

A message is `<|im_start|>`, its header `role⏎`, its content, `<|im_end|>` and a line break, each encoded apart. Were
the whole text encoded at once, a content's first `-` would merge with the header's line break, and an answer would be
learnt from another token on than it is generated from. A tokenizer folder for chat (`Tokenizer.save`) has Hugging
Face's tools do the same.

A conversation opens no turn by what is typed: `<|im_start|>` and `<|im_end|>` inside a content are plain text here. In
Hugging Face's tools they are the pieces themselves.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from yaongi.data.chats.template import ANSWER, ROLES, read_message
from yaongi.data.pieces import END_OF_TURN, START_OF_TURN, USER_PIECES
from yaongi.data.text import normalize
from yaongi.data.tokenizer import Tokenizer

TrainOn = Literal["answers", "all", "last"]

_HEADER = rf"(?:{'|'.join(ROLES)})\n"
_ROLE_LINE = re.compile(_HEADER)
_OPENING = re.compile(rf"({re.escape(START_OF_TURN)}{_HEADER})")
_PIECE = re.compile("(" + "|".join(map(re.escape, sorted(USER_PIECES, key=len, reverse=True))) + ")")
_INSIDE_NAME = re.compile(r"(?<=<\|im)(?=_(?:start|end)\|>)")


class Encoded(NamedTuple):
    """A conversation."""

    ids: list[int]  # (n,)
    mask: list[bool]  # (n,): which of the ids are learnt, each predicted from the ids before it


def encode_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, train_on: TrainOn = "answers"
) -> Encoded:
    """Return a conversation's ids, and which of them are learnt.

    Args:
        messages: each a `role` and a `content`, text or parts of text, whose blanks at both ends go. One with
            `weight: 0` or `train: false` is not learnt.
        train_on: `answers`: the content of each answer and its `<|im_end|>`; `last`: those of the last answer alone;
            `all`: every id.

    Raises:
        ValueError: there is no message, or one has another role, or a content or weight that is none.
    """
    if train_on not in get_args(TrainOn):
        raise ValueError(f"chat: train_on must be one of {', '.join(get_args(TrainOn))}, got {train_on!r}")
    turns = _turns(messages)
    answers = [number for number, (role, _) in enumerate(turns) if role == ANSWER]
    learnt = set(answers[-1:] if train_on == "last" else answers)
    ids: list[int] = []
    mask: list[bool] = []
    for number, (message, (role, content)) in enumerate(zip(messages, turns, strict=True)):
        header, body, end = encode_header(role, tokenizer), encode_content(content, tokenizer), _end(tokenizer)
        weight = _weight(message)
        around, inside = weight and train_on == "all", weight and (train_on == "all" or number in learnt)
        ids += header + body + end
        mask += [around] * len(header) + [inside] * (len(body) + 1) + [around] * (len(end) - 1)
    return Encoded(ids, mask)


def encode_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """Return a conversation's ids and the header of the answer that is to follow; errors as in `encode_chat`."""
    return [*encode_chat(messages, tokenizer).ids, *encode_header(ANSWER, tokenizer)]


def encode_rendered(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Return the ids of a text that may hold messages as `render_chat` writes them, each header encoded apart.

    They are `encode_chat`'s where no content holds the name of a chat piece.

    Args:
        encode: gives the ids of plain text, as `Tokenizer.encode` does.
    """
    if START_OF_TURN not in text:
        return encode(text)
    return [token for part in _OPENING.split(text) for token in _encode_apart(part, encode)]


def encode_content(content: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a content, in which the names of the pieces that open and end a turn are plain text."""
    parts = _INSIDE_NAME.split(normalize(content))
    return [token for part in parts for token in _encode_apart(part, tokenizer.encode)]


def _encode_apart(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Return the ids of a text in which a role on a line of its own, right after a piece, is encoded apart.

    Hugging Face's tools can't tell it from a header: they see what lies between two pieces, not which piece it follows.
    """
    if not _ROLE_LINE.search(text):
        return encode(text)
    ids: list[int] = []
    for number, part in enumerate(_PIECE.split(text)):
        header = _ROLE_LINE.match(part) if number else None
        cut = header.end() if header else 0
        ids += encode(part[:cut])
        ids += encode(part[cut:])
    return ids


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    turns = [read_message(message) for message in messages]
    if not turns:
        raise ValueError("chat: messages must be one or more, got none")
    for role, _ in turns:
        if role not in ROLES:
            raise ValueError(f"chat: role must be one of {', '.join(ROLES)}, got {role!r}")
    return turns


def _weight(message: Mapping[str, Any]) -> bool:
    """Return whether a message may be learnt."""
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise ValueError(f"chat: weight must be 0 or 1, got {weight!r}")
    if train not in (None, False, True):
        raise ValueError(f"chat: train must be true or false, got {train!r}")
    return weight != 0 and train is not False


def encode_header(role: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that open a turn of `role`."""
    return [tokenizer.piece_to_id(START_OF_TURN), *tokenizer.encode(f"{role}\n")]


def _end(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.piece_to_id(END_OF_TURN), *tokenizer.encode("\n")]
