"""What is kept of a conversation, as many turns as fit into a row; and what is lost, and why."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from yaongi.data.chats.encode import Encoded, TrainOn, encode_chat
from yaongi.data.chats.formats import Message, Talk
from yaongi.data.chats.template import ANSWER
from yaongi.data.pieces import START_OF_TURN
from yaongi.data.tokenizer import Tokenizer

TooLong = Literal["turns", "error"]
TOO_LONG, NOTHING_LEARNT = "too long", "nothing is learnt"


class Loss(NamedTuple):
    """What is lost for one reason."""

    reason: str
    conversations: int  # lost as a whole
    turns: int
    targets: int  # ids that would have been learnt


class Fitted(NamedTuple):
    """What is kept: a conversation, or a chosen and a rejected one, or nothing."""

    kept: tuple[Encoded, ...]
    losses: tuple[Loss, ...]


def fit_talk(talk: Talk, tokenizer: Tokenizer, row_tokens: int, train_on: TrainOn, too_long: TooLong) -> Fitted:
    """Encode what can be kept of a conversation.

    The first turn that is an empty answer or calls a tool ends it, and so does the last answer. If it is too long,
    whole turns go from its end; an answer is never cut.

    Args:
        too_long: `error`: refuse a conversation that is too long.

    Raises:
        ValueError: it is too long, or a message's weight is none.
    """
    whole, reason = _learnable(talk)
    losses = []
    if len(whole) < len(talk):
        rest = talk[len(whole) :]
        losses.append(Loss(reason, int(not whole), len(rest), sum(encode_chat(rest, tokenizer).mask)))
    if not whole:
        return Fitted((), tuple(losses))
    encoded = encode_chat(whole, tokenizer, train_on=train_on)
    targets = count_targets(encoded)
    if not targets:
        return Fitted((), (*losses, Loss(NOTHING_LEARNT, 1, len(whole), 0)))
    if len(encoded.ids) <= row_tokens:
        return Fitted((encoded,), tuple(losses))
    _refuse_if(too_long, row_tokens, len(encoded.ids))
    turns = _turns_that_fit(whole, encoded.ids, row_tokens, tokenizer)
    shorter = encode_chat(whole[:turns], tokenizer, train_on=train_on) if turns else Encoded([], [])
    if not count_targets(shorter):  # not even the first exchange fits, or nothing of what does is learnt
        return Fitted((), (*losses, Loss(TOO_LONG, 1, len(whole), targets)))
    return Fitted((shorter,), (*losses, Loss(TOO_LONG, 0, len(whole) - turns, targets - count_targets(shorter))))


def fit_pair(talks: Sequence[Talk], tokenizer: Tokenizer, row_tokens: int, too_long: TooLong) -> Fitted:
    """Encode a chosen and a rejected conversation, whole or not at all; errors as in `fit_talk`."""
    encoded = [encode_chat(talk, tokenizer) for talk in talks]
    longest = max(len(talk.ids) for talk in encoded)
    reason = next((reason for _, reason in map(_learnable, talks) if reason), "")
    if not reason and encoded[0] == encoded[1]:
        reason = "chosen is rejected"
    if not reason and not all(map(count_targets, encoded)):
        reason = NOTHING_LEARNT
    if not reason and longest > row_tokens:
        _refuse_if(too_long, row_tokens, longest)
        reason = TOO_LONG
    if not reason:
        return Fitted(tuple(encoded), ())
    return Fitted((), (Loss(reason, 1, sum(map(len, talks)), sum(map(count_targets, encoded))),))


def count_targets(encoded: Encoded) -> int:
    """Return how many ids are learnt; the first is none, as nothing precedes it."""
    return sum(encoded.mask[1:])


def _learnable(talk: Talk) -> tuple[Talk, str]:
    """Return the turns up to the last answer, and the reason why there are no more; an empty one if there are none."""
    end, reason = len(talk), "after the last answer"
    for number, message in enumerate(talk):
        if why := _unusable(message):
            end, reason = number, why
            break
    answers = [number for number in range(end) if talk[number]["role"] == ANSWER]
    if not answers:
        return [], reason if end < len(talk) else "no answer"
    kept = talk[: answers[-1] + 1]
    return kept, reason if len(kept) < len(talk) else ""


def _unusable(message: Message) -> str:
    """Return why a message can't be learnt from, nor what follows it; an empty text if it can."""
    if message.get("tool_calls"):
        return "tool call"
    return "empty answer" if message["role"] == ANSWER and not message["content"] else ""


def _turns_that_fit(talk: Talk, ids: Sequence[int], row_tokens: int, tokenizer: Tokenizer) -> int:
    """Return how many turns fit into a row, the last of them an answer; 0 if none do."""
    start = tokenizer.piece_to_id(START_OF_TURN)
    ends = [place for place, token in enumerate(ids) if token == start][1:]  # of all turns but the last
    fitting = [n for n, end in enumerate(ends, 1) if end <= row_tokens and talk[n - 1]["role"] == ANSWER]
    return max(fitting, default=0)


def _refuse_if(too_long: TooLong, row_tokens: int, tokens: int) -> None:
    if too_long == "error":
        raise ValueError(f"chat: a conversation must fit into {row_tokens} tokens (--row-tokens), got {tokens}")
