"""Conversations as they are learnt: the check that everyone should make before tuning."""

from itertools import groupby

from rich.console import Console
from rich.text import Text

from yaongi.data.chats.rows import CHAT, Conversation, Conversations
from yaongi.data.shards import ShardSet
from yaongi.data.tokenizer import Tokenizer

_LEARNT = "bold green"
_MARKS = "⟦", "⟧"  # around what is learnt, where there are no colours


def show_chats(shard_set: ShardSet, tokenizer: Tokenizer, count: int, console: Console | None = None) -> None:
    """Print the first `count` conversations or pairs of the training split; what is learnt in colour."""
    console = console or Console()
    conversations = Conversations(shard_set, "train")
    names = [""] if shard_set.manifest["kind"] == CHAT else ["chosen", "rejected"]
    for number in range(min(count * len(names), len(conversations))):
        found = conversations.read(number)
        name = names[number % len(names)]
        title = f"{number // len(names) + 1}" + (f", {name}" if name else "")
        console.rule(f"{title}: {len(found.ids)} tokens, {int(found.mask[1:].sum())} learnt")
        console.print(coloured(found, tokenizer, marks=not console.is_terminal), soft_wrap=True)


def coloured(conversation: Conversation, tokenizer: Tokenizer, *, marks: bool) -> Text:
    """Return a conversation's text, in which what is learnt has a colour, and `marks` around it if wanted."""
    text = Text()
    pairs = zip(conversation.ids.tolist(), conversation.mask.tolist(), strict=True)
    for learnt, run in groupby(pairs, key=lambda pair: pair[1]):
        part = tokenizer.decode([token for token, _ in run])
        if learnt and marks:
            part = part.join(_MARKS)
        text.append(part, _LEARNT if learnt else "dim")
    return text
