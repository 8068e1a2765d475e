"""Chat data in every format becomes the same conversation; what is wrong is named."""

from typing import Any

import pytest

from yaongi.data.chats.encode import encode_chat
from yaongi.data.chats.fitting import Loss, fit_pair, fit_talk
from yaongi.data.chats.formats import find_format, read_talks
from yaongi.data.tokenizer import Tokenizer

SYSTEM = {"role": "system", "content": "짧게"}
ASKED, ANSWERED = {"role": "user", "content": "1 +\n1?"}, {"role": "assistant", "content": "2"}
AGAIN, OTHER = {"role": "user", "content": "더?"}, {"role": "assistant", "content": "3"}


def talks(row: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return read_talks(row, find_format(row))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, ASKED, ANSWERED], "id": 1},
        {
            "messages": [
                SYSTEM,
                {**ASKED, "content": [{"type": "text", "text": "1 +\n"}, {"type": "text", "text": "1?"}]},
                ANSWERED,
            ]
        },
        {"conversations": [{"from": "human", "value": "1 +\n1?"}, {"from": "gpt", "value": "2"}], "system": "짧게"},
        {
            "conversations": [
                {"from": f, "value": v} for f, v in (("system", "짧게"), ("user", "1 +\n1?"), ("assistant", "2"))
            ]
        },
        {"conversations": [SYSTEM, ASKED, ANSWERED], "messages": None},
        {"instruction": "1 +", "input": "1?", "output": "2", "system": "짧게"},
        {"instruction": "1 +\n1?", "input": "", "output": "2", "system": "짧게", "history": []},
    ],
)
def test_formats_are_one_conversation(row: dict[str, Any]) -> None:
    assert talks(row) == [[SYSTEM, ASKED, ANSWERED]]


def test_alpaca_s_history_is_learnt_too(tokenizer: Tokenizer) -> None:
    (talk,) = talks({"instruction": "더?", "output": "3", "history": [["1 +\n1?", "2"]]})
    assert talk == [ASKED, ANSWERED, AGAIN, OTHER]
    assert encode_chat(talk, tokenizer) == encode_chat([ASKED, ANSWERED, AGAIN, OTHER], tokenizer)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "더?", "completion": "3"},
        {"prompt": [AGAIN], "completion": [OTHER]},
        {"prompt": [ASKED, ANSWERED, AGAIN], "completion": "3"},
    ],
)
def test_a_completion_alone_is_learnt(tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    (talk,) = talks(row)
    assert [message["content"] for message in talk][-2:] == ["더?", "3"]
    ids, mask = encode_chat(talk, tokenizer)
    assert tokenizer.decode([token for token, learnt in zip(ids, mask, strict=True) if learnt]) == "3<|im_end|>"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "더?", "chosen": "2", "rejected": "3"},
        {"prompt": [AGAIN], "chosen": [ANSWERED], "rejected": [OTHER]},
        {"prompt": "더?", "chosen": [AGAIN, ANSWERED], "rejected": [AGAIN, OTHER]},
        {"chosen": [AGAIN, ANSWERED], "rejected": [AGAIN, OTHER]},
    ],
)
def test_preferences_share_a_prompt_that_is_not_learnt(tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    chosen, rejected = talks(row)
    assert [m["content"] for m in chosen] == ["더?", "2"]
    assert [m["content"] for m in rejected] == ["더?", "3"]
    assert [m.get("weight") for m in chosen] == [0, None]
    (first, second), losses = fit_pair([chosen, rejected], tokenizer, 64, "turns")
    assert losses == ()
    assert first == encode_chat([AGAIN, ANSWERED], tokenizer)
    assert second == encode_chat([AGAIN, OTHER], tokenizer)


def test_weights_and_tools_are_kept() -> None:
    messages = [ASKED, {**ANSWERED, "weight": 0, "tool_calls": None}, {"role": "tool", "content": "x"}, OTHER]
    assert talks({"messages": messages}) == [
        [ASKED, {**ANSWERED, "weight": 0}, {"role": "tool", "content": "x"}, OTHER]
    ]
    (talk,) = talks({"conversations": [{"from": "observation", "value": "x"}]})
    assert talk == [{"role": "tool", "content": "x"}]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "a row must have one of: chosen and rejected; messages; .*, got text"),
        ({"messages": None}, "a row must have one of: .*, got messages"),
        ({"messages": "x"}, "messages must be a list, got str"),
        ({"messages": [{"role": "human", "content": "x"}]}, "role must be one of system, .*, got 'human'"),
        ({"messages": [{"role": "user", "content": 5}]}, "content must be text or a list of parts, got int"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content must be .*, got null"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "from must be one of human, .*, got 'bing'"),
        ({"conversations": [{"from": "gpt", "text": "x"}]}, "content must be .*, got null"),
        ({"instruction": 1, "output": "x"}, "instruction and input must be text, got int and str"),
        ({"instruction": "q", "output": "x", "history": [["q"]]}, "history must hold pairs"),
        ({"prompt": {"a": 1}, "completion": "x"}, "content must be .*, got dict"),
    ],
)
def test_what_is_wrong_is_named(row: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        talks(row)


def learnt(tokenizer: Tokenizer, *messages: dict[str, Any]) -> int:
    return sum(encode_chat(messages, tokenizer).mask)


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}
EMPTY = {"role": "assistant", "content": ""}


def test_what_is_lost_has_a_reason(tokenizer: Tokenizer) -> None:
    def fit(*talk: dict[str, Any]) -> Any:
        return fit_talk(list(talk), tokenizer, 64, "answers", "turns")

    whole = encode_chat([ASKED, ANSWERED], tokenizer)
    assert fit(ASKED, ANSWERED) == ((whole,), ())
    assert fit(ASKED, ANSWERED, AGAIN) == ((whole,), (Loss("after the last answer", 0, 1, 0),))
    lost = learnt(tokenizer, AGAIN, OTHER)
    assert fit(ASKED, ANSWERED, AGAIN, EMPTY, AGAIN, OTHER) == ((whole,), (Loss("empty answer", 0, 4, lost + 1),))
    assert fit(ASKED, ANSWERED, AGAIN, CALL, {"role": "tool", "content": "x"}, OTHER) == (
        (whole,),
        (Loss("tool call", 0, 4, lost + 1),),
    )
    assert fit(ASKED) == ((), (Loss("no answer", 1, 1, 0),))
    assert fit(ASKED, EMPTY) == ((), (Loss("empty answer", 1, 2, 1),))
    assert fit(ASKED, {**ANSWERED, "weight": 0}) == ((), (Loss("nothing is learnt", 1, 2, 0),))


def test_whole_turns_go_until_it_fits(tokenizer: Tokenizer) -> None:
    """At each length it is the longest conversation that fits and ends with an answer, and the sums are whole."""
    talk = [SYSTEM, ASKED, ANSWERED, AGAIN, OTHER, AGAIN, {"role": "assistant", "content": "가나다 " * 9}]
    lengths = {n: len(encode_chat(talk[:n], tokenizer).ids) for n in (3, 5, 7)}
    targets = {n: learnt(tokenizer, *talk[:n]) for n in (3, 5, 7)}
    for row_tokens in range(lengths[3] - 2, lengths[7] + 2):
        kept, losses = fit_talk(talk, tokenizer, row_tokens, "answers", "turns")
        turns = max((n for n in lengths if lengths[n] <= row_tokens), default=0)
        assert kept == ((encode_chat(talk[:turns], tokenizer),) if turns else ())
        left = targets[7] - targets.get(turns, 0)
        assert losses == (() if turns == 7 else (Loss("too long", int(not turns), 7 - turns, left),))
    (kept,), _ = fit_talk(talk, tokenizer, lengths[5], "last", "turns")
    assert kept == encode_chat(talk[:5], tokenizer, train_on="last")
    with pytest.raises(ValueError, match=rf"must fit into {lengths[5]} tokens \(--row-tokens\), got {lengths[7]}"):
        fit_talk(talk, tokenizer, lengths[5], "answers", "error")


def test_a_pair_is_kept_whole_or_not_at_all(tokenizer: Tokenizer) -> None:
    def reason(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]], row_tokens: int = 64) -> str:
        kept, (loss,) = fit_pair([chosen, rejected], tokenizer, row_tokens, "turns")
        assert (kept, loss.conversations, loss.turns) == ((), 1, len(chosen) + len(rejected))
        return loss.reason

    assert reason([ASKED, ANSWERED], [ASKED, EMPTY]) == "empty answer"
    assert reason([ASKED, ANSWERED], [ASKED, CALL]) == "tool call"
    assert reason([ASKED, ANSWERED], [ASKED, OTHER, AGAIN]) == "after the last answer"
    assert reason([ASKED, ANSWERED], [ASKED, ANSWERED]) == "chosen is rejected"
    assert reason([ASKED, ANSWERED], [ASKED, {**OTHER, "weight": 0}]) == "nothing is learnt"
    longest = [ASKED, {"role": "assistant", "content": "x " * 40}]
    assert reason([ASKED, ANSWERED], longest, 40) == "too long"
    with pytest.raises(ValueError, match=r"must fit into 40 tokens \(--row-tokens\), got"):
        fit_pair([[ASKED, ANSWERED], longest], tokenizer, 40, "error")
