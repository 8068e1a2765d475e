"""Text from tokens as they come: whole characters only, and an end at the first stop string."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what decoding puts for the first bytes of a character whose others have not come


class TextStream:
    """The text of one answer. Text is given out once it is final: no more bytes or stop strings can change it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        """Begin an answer.

        Args:
            decode: the text of token ids.
            stop: strings that end the answer; it ends before the first that is complete.

        Raises:
            ValueError: a stop string is empty.
        """
        if "" in stop:
            raise ValueError("generate: stop strings must be one character or longer, got an empty one")
        self._decode, self._stop = decode, stop
        self._tokens: list[int] = []  # those whose text is not in `_text` yet
        self._text = ""  # decoded, not given out yet
        self.ended = False  # whether a stop string has come

    def push(self, token: int) -> str:
        """Add a token and return the text that is final now; after the end it is empty."""
        if self.ended:
            return ""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if text.endswith(UNFINISHED):
            return ""
        self._tokens = []
        return self._final(text)

    def finish(self) -> str:
        """Return the rest of the text, at the end of the answer; bytes that are no character become U+FFFD."""
        if self.ended:
            return ""
        text = self._final(self._decode(self._tokens)) if self._tokens else ""
        rest, self._tokens, self._text = self._text, [], ""
        return text if self.ended else text + rest

    def _final(self, text: str) -> str:
        """Add decoded text, and return what can be given out."""
        self._text += text
        found = [place for place in (self._text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.ended, cut = True, min(found)
        else:
            cut = len(self._text) - max((_begun(self._text, stop) for stop in self._stop), default=0)
        final, self._text = self._text[:cut], self._text[cut:]
        return final


def _begun(text: str, stop: str) -> int:
    """Return the length of the longest end of the text with which the stop string begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
