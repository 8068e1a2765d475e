"""The chat format: a conversation as text, in Python and as a template for Hugging Face."""

from collections.abc import Mapping, Sequence
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def render_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return `<|im_start|>role⏎content<|im_end|>⏎` for each message that has content.

    Raises:
        ValueError: a message has no role.
    """
    parts = []
    for message in messages:
        if not message.get("role"):
            raise ValueError(f"chat: every message must have a role, got keys {sorted(message)}")
        if message.get("content"):
            parts.append(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n")
    return "".join(parts)
