"""The chat format: a conversation as text, in Python and as a template for Hugging Face."""

from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
ANSWER = "assistant"
ANSWER_HEADER = f"<|im_start|>{ANSWER}\n"

# `generation` marks what trainers train on: an assistant's answer and the piece that ends it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = message['content'] if message['content'] is string"
    " else message['content'] | map(attribute='text') | join %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ content | trim }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ content | trim }}<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def render_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return `<|im_start|>role⏎content<|im_end|>⏎` for each message; an empty text if no message has content.

    Raises:
        ValueError: as in `read_message`.
    """
    read = [read_message(message) for message in messages]
    if not any(content for _, content in read):
        return ""
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in read)


def read_message(message: Any) -> tuple[str, str]:
    """Return a message's role, and its content without blanks at its ends.

    Raises:
        ValueError: it is no object or has no role, or its content is neither text nor parts of text.
    """
    if not isinstance(message, Mapping):
        raise ValueError(f"chat: every message must be an object, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"chat: every message must have a role, got keys {sorted(map(str, message))}")
    return role, read_content(message.get("content")).strip()


def read_content(content: Any) -> str:
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
