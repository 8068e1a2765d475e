"""Answers in OpenAI's form: whole, or as the events of a stream."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from yaongi.data.pieces import CONTROL_PIECES
from yaongi.data.tokenizer import Tokenizer
from yaongi.serve.requests import Call
from yaongi.serve.rows import Piece, Scored

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


def error_json(
    message: str, field: str | None = None, *, kind: str = "invalid_request_error", code: str | None = None
) -> Json:
    """Return the body of an error."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


class Replies:
    """The replies to one call: their names are the same in all of its events."""

    def __init__(self, call: Call, name: str, tokenizer: Tokenizer) -> None:
        self._call, self._tokenizer = call, tokenizer
        chat = call.kind == "chat"
        self._object = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self._head: Json = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        self._tokens = 0
        self._offsets: dict[int, int] = {}  # characters of each answer's scored tokens so far

    def whole(self, answers: Sequence[Piece]) -> Json:
        """Return the reply with all answers."""
        choices = []
        for index, answer in enumerate(answers):
            choice: Json = {"index": index, **self._body(index, answer), "finish_reason": answer.finish}
            if self._call.kind == "chat":
                choice["message"] = {"role": "assistant", "content": choice.pop("text")}
            choices.append(choice)
        self._tokens = sum(answer.tokens for answer in answers)
        return {"object": self._object, **self._head, "choices": choices, "usage": self._usage()}

    def first(self, index: int) -> list[bytes]:
        """Return the events that come before an answer's first token."""
        if self._call.kind == "chat":
            return [self._event({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})]
        return []

    def more(self, index: int, piece: Piece, *, begins: bool = False) -> list[bytes]:
        """Return the events of what has come of an answer; `begins`: nothing of it has come before."""
        self._tokens += piece.tokens
        if piece.error is not None:
            return [_event(error_json(piece.error, kind="server_error"))]
        body = self._body(index, piece, begins=begins)
        if not (body["text"] or body["logprobs"] or piece.finish):
            return []
        choice: Json = {"index": index, **body, "finish_reason": piece.finish}
        if self._call.kind == "chat":
            text = choice.pop("text")
            choice["delta"] = {"content": text} if text else {}
        return [self._event(choice)]

    def last(self) -> list[bytes]:
        """Return the events that come after the answers."""
        if not self._call.include_usage:
            return [DONE]
        return [_event({"object": self._chunk, **self._head, "choices": [], "usage": self._usage()}), DONE]

    @property
    def _chunk(self) -> str:
        return f"{self._object}.chunk" if self._call.kind == "chat" else self._object

    def _event(self, choice: Json) -> bytes:
        usage = {"usage": None} if self._call.include_usage else {}
        return _event({"object": self._chunk, **self._head, "choices": [choice], **usage})

    def _usage(self) -> Json:
        prompt = self._call.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": self._tokens, "total_tokens": prompt + self._tokens}

    def _body(self, index: int, piece: Piece, *, begins: bool = True) -> Json:
        """Return an answer's text, after its prompt if that is echoed, and the scores of its tokens."""
        echoed = self._tokenizer.decode(self._call.requests[index].prompt) if self._call.echo and begins else ""
        scores = None
        if piece.scored:
            scores = self._chat_scores(piece.scored) if self._call.kind == "chat" else self._scores(index, piece.scored)
        return {"text": echoed + piece.text, "logprobs": scores}

    def _scores(self, index: int, scored: Sequence[Scored]) -> Json:
        """Return scores as completions have them: a list per property."""
        texts = [self._shown(score.token) for score in scored]
        offsets, place = [], self._offsets.get(index, 0)
        for text in texts:
            offsets.append(place)
            place += len(text)
        self._offsets[index] = place
        likeliest = []
        for score in scored:
            own = () if score.logprob is None else ((score.token, score.logprob),)
            found = sorted({*score.likeliest, *own}, key=lambda pair: -pair[1])
            likeliest.append({self._shown(token): logprob for token, logprob in found} if own else None)
        return {
            "tokens": texts,
            "token_logprobs": [score.logprob for score in scored],
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }

    def _chat_scores(self, scored: Sequence[Scored]) -> Json:
        """Return scores as chats have them: an object per token."""

        def entry(token: int, logprob: float | None) -> Json:
            return {"token": self._shown(token), "logprob": logprob, "bytes": list(self._tokenizer.token_bytes(token))}

        return {
            "content": [
                {**entry(score.token, score.logprob), "top_logprobs": [entry(*pair) for pair in score.likeliest]}
                for score in scored
            ]
        }

    def _shown(self, token: int) -> str:
        """Return a token's text; for a byte its number, for a control piece its name: no two tokens share one."""
        if self._tokenizer.is_byte(token):
            return f"bytes:\\x{self._tokenizer.token_bytes(token).hex()}"
        return CONTROL_PIECES[token] if token < len(CONTROL_PIECES) else self._tokenizer.decode([token])


def _event(body: Json) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
