"""The formats of chat data: a row of any of them becomes one conversation, or a chosen and a rejected one.

* `messages`: OpenAI's and TRL's; `weight: 0` or `train: false` marks an answer that is not learnt;
* `conversations`: ShareGPT's, with `from` and `value`, and perhaps a `system` beside them;
* `instruction`, `input`, `output`, and perhaps `system` and `history`: Alpaca's;
* `prompt` and `completion`: TRL's, text or messages; only the completion is learnt;
* `prompt`, `chosen` and `rejected`: preferences, text or messages, which may repeat the prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from yaongi.data.chats.template import ROLES, read_message

Message = dict[str, Any]  # role, content; perhaps weight and train; tool_calls where it calls a tool
Talk = list[Message]
PREFERENCE = "preference"
_KEYS: Mapping[str, tuple[str, ...]] = {
    PREFERENCE: ("chosen", "rejected"),
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "Alpaca": ("instruction", "output"),
}
_SHAREGPT_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **{"tool": "tool", "observation": "tool", "function_call": "assistant"},
}


def find_format(row: Mapping[str, Any]) -> str:
    """Return the name of a row's format. Raises ValueError for a row of none."""
    for name, keys in _KEYS.items():
        if all(row.get(key) is not None for key in keys):
            return name
    wanted = "; ".join(" and ".join(keys) for keys in _KEYS.values())
    raise ValueError(f"chat: a row must have one of: {wanted}, got {', '.join(sorted(map(str, row))) or 'no keys'}")


def read_talks(row: Mapping[str, Any], format: str) -> list[Talk]:
    """Return a row's conversation, or the chosen and the rejected one.

    Raises:
        ValueError: a message has an unknown role, or a content that is neither text nor parts of text.
    """
    if format == PREFERENCE:
        return _preference(row)
    if format == "messages":
        return [_messages(row["messages"])]
    if format == "ShareGPT":
        return [_system(row) + [_sharegpt(message) for message in _list(row["conversations"], "conversations")]]
    if format == "Alpaca":
        return [_alpaca(row)]
    return [_given(_side(row["prompt"], "user")) + _side(row["completion"], "assistant")]


def _messages(messages: Any) -> Talk:
    return [_message(message) for message in _list(messages, "messages")]


def _message(message: Any) -> Message:
    calls = isinstance(message, Mapping) and (message.get("tool_calls") or message.get("function_call"))
    role, content = read_message({**message, "content": message.get("content") or ""} if calls else message)
    if role not in ROLES:
        raise ValueError(f"chat: role must be one of {', '.join(ROLES)}, got {role!r}")
    marks = {key: message[key] for key in ("weight", "train") if message.get(key) is not None}
    return {"role": role, "content": content, **marks, **({"tool_calls": calls} if calls else {})}


def _sharegpt(message: Any) -> Message:
    if isinstance(message, Mapping) and "from" not in message:
        return _message(message)
    speaker = message.get("from") if isinstance(message, Mapping) else None
    if speaker not in _SHAREGPT_ROLES:
        raise ValueError(f"chat: from must be one of {', '.join(_SHAREGPT_ROLES)}, got {speaker!r}")
    calls = {"tool_calls": True} if speaker == "function_call" else {}
    return _message({**message, "role": _SHAREGPT_ROLES[speaker], "content": message.get("value"), **calls})


def _alpaca(row: Mapping[str, Any]) -> Talk:
    talk = _system(row)
    for exchange in _list(row.get("history") or [], "history"):
        if not isinstance(exchange, Sequence) or isinstance(exchange, str) or len(exchange) != 2:
            raise ValueError(f"chat: history must hold pairs of question and answer, got {exchange!r:.60}")
        talk += _side(exchange[0], "user") + _side(exchange[1], "assistant")
    instruction, further = row["instruction"], row.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(further, str):
        got = f"{type(instruction).__name__} and {type(further).__name__}"
        raise ValueError(f"chat: instruction and input must be text, got {got}")
    asked = f"{instruction}\n{further}" if further.strip() else instruction
    return talk + _side(asked, "user") + _side(row["output"], "assistant")


def _preference(row: Mapping[str, Any]) -> list[Talk]:
    """Return the chosen and the rejected conversation; of what they share, nothing is learnt."""
    prompt = _side(row["prompt"], "user") if row.get("prompt") is not None else []
    sides = [_side(row[key], "assistant") for key in ("chosen", "rejected")]
    if prompt and all(_same(side[: len(prompt)], prompt) for side in sides):
        sides = [side[len(prompt) :] for side in sides]
    if not prompt:
        shared = 0
        while all(shared < len(side) - 1 for side in sides) and _same(sides[0][shared : shared + 1], sides[1][shared:]):
            shared += 1
        prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
    return [_given(prompt) + side for side in sides]


def _same(talk: Talk, other: Talk) -> bool:
    """Return whether the messages of `talk` are the first of `other`."""
    pairs = zip(talk, other, strict=False)
    return len(talk) <= len(other) and all(a["role"] == b["role"] and a["content"] == b["content"] for a, b in pairs)


def _given(prompt: Talk) -> Talk:
    """Return messages of which nothing is learnt."""
    return [{**message, "weight": 0} for message in prompt]


def _side(value: Any, role: str) -> Talk:
    """Return messages that are given as such, or as the text of one of `role`."""
    return _messages(value) if isinstance(value, list) else [_message({"role": role, "content": value})]


def _system(row: Mapping[str, Any]) -> Talk:
    return _side(row["system"], "system") if row.get("system") else []


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"chat: {key} must be a list, got {type(value).__name__}")
    return value
