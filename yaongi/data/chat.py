"""The chat format: a conversation as text, in Python and as a template for Hugging Face."""

from collections.abc import Mapping, Sequence
from typing import Any

# `generation` marks what trainers train on: an assistant's answer and the piece that ends it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def render_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return `<|im_start|>role⏎content<|im_end|>⏎` for each message; an empty text if no message has content.

    Raises:
        ValueError: a message is no object or has no role, or its content is neither text nor parts of text.
    """
    parts, blank = [], True
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"chat: every message must be an object, got {type(message).__name__}")
        if not message.get("role"):
            raise ValueError(f"chat: every message must have a role, got keys {sorted(message)}")
        content = _content(message.get("content"))
        blank = blank and not content.strip()
        parts.append(f"<|im_start|>{message['role']}\n{content}<|im_end|>\n")
    return "" if blank else "".join(parts)


def _content(content: Any) -> str:
    """Return a message's text, which may come in parts such as `{"type": "text", "text": "…"}`."""
    if isinstance(content, list):
        return "".join(map(_part, content))
    if not isinstance(content, str):
        got = "null" if content is None else type(content).__name__
        raise ValueError(f"chat: content must be text or a list of parts, got {got}")
    return content


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind != "text":
        raise ValueError(f"chat: a part of a message must be of type 'text', got {kind!r}")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"chat: the text of a part must be text, got {type(part.get('text')).__name__}")
    return part["text"]
