"""Tokens of long prompts that are mostly the same, such as the questions of a subject after the same five examples."""

import re
from functools import lru_cache
from itertools import chain

from yaongi.data.chats.encode import encode_rendered
from yaongi.data.tokenizer import Tokenizer

# Runs of two to four newlines are pieces of their own, which merge with nothing: the text may be cut around them.
_BREAK = re.compile(r"(?<!\n)(\n{2,4})(?!\n)")


class CachedEncoder:
    """`Tokenizer.encode`, paragraph by paragraph, with a memory of the last ones."""

    def __init__(self, tokenizer: Tokenizer, paragraphs: int = 1 << 14) -> None:
        self._encode = lru_cache(paragraphs)(lambda text: tuple(tokenizer.encode(text)))

    def __call__(self, text: str) -> list[int]:
        """Return the ids of `text`, in which messages may be rendered. Raises ValueError for a lone surrogate."""
        return encode_rendered(text, self._by_paragraph)

    def _by_paragraph(self, text: str) -> list[int]:
        if "\n\n\n" in text:
            return list(chain.from_iterable(map(self._encode, _BREAK.split(text))))
        first, *rest = map(self._encode, text.split("\n\n"))
        ids = list(first)
        for paragraph in rest:
            ids += self._encode("\n\n")
            ids += paragraph
        return ids
