"""The bodies of requests, in OpenAI's form: read, checked field by field, and turned into requests of the engine."""

import json
import math
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from yaongi.data.chats.encode import encode_prompt
from yaongi.data.tokenizer import Tokenizer
from yaongi.model.sampling import Sampling
from yaongi.serve.rows import Request

MOST_ANSWERS = 128  # of one call
MOST_STOPS, LONGEST_STOP = 32, 1000  # strings, and characters of one
MOST_ALTERNATIVES = 20
COMPLETION_TOKENS = 16  # of a completion that doesn't say how many, as at OpenAI
TOO_LONG = "context_length_exceeded"
SHOWN = 40  # characters of a wrong value that its error shows


class BadRequestError(Exception):
    """A request that can't be answered: a status, one line, the field that is to blame, and OpenAI's code for it."""

    def __init__(self, message: str, field: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.field, self.status, self.code = field, status, code


@dataclass(frozen=True)
class Served:
    """What requests are checked against."""

    name: str  # of the model
    tokenizer: Tokenizer
    capacity: int  # tokens of prompt and answer together


@dataclass(frozen=True)
class Call:
    """A call: the answers that it asks for, in the order of their indices."""

    kind: Literal["chat", "completion"]
    requests: tuple[Request, ...]
    prompt_tokens: int  # each prompt counted once
    stream: bool
    include_usage: bool
    echo: bool


def read_chat(body: bytes, served: Served) -> Call:
    """Read the body of `/v1/chat/completions`. Raises BadRequestError."""
    fields = _Fields(body, served)
    prompt = _encoded(lambda: encode_prompt(_messages(fields), served.tokenizer), "messages")
    longest = max(served.capacity - len(prompt), 1)
    wanted = fields.integer("max_completion_tokens", 1, None)
    limit = fields.integer("max_tokens", 1, None, default=longest)
    scored, most = fields.boolean("logprobs"), fields.integer("top_logprobs", 0, MOST_ALTERNATIVES)
    if most is not None and not scored:
        raise BadRequestError("top_logprobs must come with logprobs: true, got it alone", "top_logprobs")
    fields.only("tools", [])
    fields.only("tool_choice", "none", "auto")
    fields.only("response_format", {"type": "text"})
    return fields.call(
        "chat", [prompt], limit if wanted is None else wanted, alternatives=(most or 0) if scored else None
    )


def read_completion(body: bytes, served: Served) -> Call:
    """Read the body of `/v1/completions`. Raises BadRequestError."""
    fields = _Fields(body, served)
    prompts = _prompts(fields.take("prompt"), served.tokenizer)
    limit = fields.integer("max_tokens", 1, None, default=COMPLETION_TOKENS)
    alternatives, echo = fields.integer("logprobs", 0, MOST_ALTERNATIVES), fields.boolean("echo")
    fields.only("suffix", "")
    fields.only("best_of", 1)
    return fields.call("completion", prompts, limit, alternatives=alternatives, echo=echo)


class _Fields:
    """A body's fields, each of which is taken once; what is left in the end is unknown."""

    def __init__(self, body: bytes, served: Served) -> None:
        self._served = served
        try:
            found = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            reason = "too deep" if isinstance(error, RecursionError) else str(error)
            raise BadRequestError(f"body must be JSON in UTF-8, got {_shown(reason, quoted=False)}") from None
        if not isinstance(found, dict):
            raise BadRequestError(f"body must be a JSON object, got {_shown(found)}")
        self._left: dict[str, Any] = {key: value for key, value in found.items() if value is not None}
        model = self.take("model", served.name)
        if model != served.name:
            raise BadRequestError(f"model must be {served.name}, got {_shown(model)}", "model", status=404)

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field's value, the default if it is absent or null."""
        return self._left.pop(name, default)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """Return a number of `low` to `high`."""
        value = self.take(name, default)
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        self._require(fits, name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def integer(self, name: str, low: int, high: int | None, default: int | None = None) -> Any:
        """Return a whole number from `low` on."""
        value = self.take(name, default)
        fits = value is default or (type(value) is int and low <= value <= (math.inf if high is None else high))
        self._require(fits, name, f"a whole number from {low}" + (" on" if high is None else f" to {high}"), value)
        return value

    def boolean(self, name: str) -> bool:
        """Return true or false, false by default."""
        value = self.take(name, False)
        self._require(isinstance(value, bool), name, "true or false", value)
        return value

    def only(self, name: str, *values: Any) -> None:
        """Take a field that may only say what is so anyway."""
        value = self.take(name, values[0])
        wanted = " or ".join([*map(json.dumps, values), "absent"])
        self._require(value in values and not isinstance(value, bool), name, wanted, value)

    def call(
        self,
        kind: Literal["chat", "completion"],
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        alternatives: int | None,
        echo: bool = False,
    ) -> Call:
        """Take the fields that both kinds have, check that nothing is left, and return the call."""
        count = self.integer("n", 1, MOST_ANSWERS, default=1)
        stream, sampling, stop = self.boolean("stream"), self._sampling(), self._stop()
        seed = self.integer("seed", -(2**63), 2**63 - 1, default=None)
        include_usage = self._include_usage(stream)
        for name in ("frequency_penalty", "presence_penalty"):
            self.only(name, 0)
        self.only("logit_bias", {})
        for ignored in ("user", "metadata", "store"):
            self.take(ignored)
        if self._left:
            unknown = min(self._left)
            raise BadRequestError(f"fields must be those of the documentation, got {_shown(unknown)}", _cut(unknown))
        if count * len(prompts) > MOST_ANSWERS:
            wanted = f"prompts times n must be at most {MOST_ANSWERS}"
            raise BadRequestError(f"{wanted}, got {len(prompts)} times {count}", "n")
        seed = secrets.randbits(63) if seed is None else seed
        copies: Counter[tuple[int, ...]] = Counter()
        requests = []
        for prompt in map(tuple, prompts):
            self._require_room(len(prompt), max_tokens, "messages" if kind == "chat" else "prompt")
            for _ in range(count):
                requests.append(Request(prompt, max_tokens, sampling, seed, copies[prompt], stop, alternatives, echo))
                copies[prompt] += 1
        return Call(kind, tuple(requests), sum(map(len, prompts)), stream, include_usage, echo)

    def _sampling(self) -> Sampling:
        temperature = self.number("temperature", 0, 2, 1.0)
        top_p, top_k = self.number("top_p", 0, 1, 1.0), self.integer("top_k", -1, None, default=-1)
        self._require(top_p > 0, "top_p", "above 0", top_p)
        most = min(top_k, self._served.tokenizer.vocab_size)  # a number that fits into a tensor
        return Sampling(temperature, most if most > 0 else None, top_p if top_p < 1 else None)

    def _stop(self) -> tuple[str, ...]:
        value = self.take("stop", [])
        strings = [value] if isinstance(value, str) else value
        fits = isinstance(strings, list) and len(strings) <= MOST_STOPS
        fits = fits and all(isinstance(string, str) and 0 < len(string) <= LONGEST_STOP for string in strings)
        wanted = f"a string of 1 to {LONGEST_STOP:,} characters, or at most {MOST_STOPS} of them"
        self._require(fits, "stop", wanted, value)
        return tuple(strings)

    def _include_usage(self, stream: bool) -> bool:
        options = self.take("stream_options")
        if options is None:
            return False
        fits = isinstance(options, dict) and set(options) <= {"include_usage"}
        fits = fits and isinstance(options.get("include_usage", False), bool)
        self._require(fits, "stream_options", '{"include_usage": true or false}', options)
        if not stream:
            raise BadRequestError("stream_options must come with stream: true, got them alone", "stream_options")
        return options.get("include_usage", False)

    def _require_room(self, prompt: int, max_tokens: int, field: str) -> None:
        capacity = self._served.capacity
        if prompt >= capacity:
            wanted = f"{field} must be at most {capacity - 1:,} tokens long"
            raise BadRequestError(f"{wanted}, got {prompt:,}", field, code=TOO_LONG)
        if prompt + max_tokens > capacity:
            wanted = f"max_tokens must be at most {capacity - prompt:,} ({capacity:,} less the prompt's {prompt:,})"
            raise BadRequestError(f"{wanted}, got {_shown(max_tokens)}", "max_tokens", code=TOO_LONG)

    def _require(self, condition: bool, name: str, wanted: str, got: Any) -> None:
        if not condition:
            raise BadRequestError(f"{name} must be {wanted}, got {_shown(got)}", name)


def _messages(fields: _Fields) -> list[dict[str, Any]]:
    """Return the messages, each of which has a role, a content, and no other field than a name or a type."""
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequestError(f"messages must be a list of one or more, got {_shown(messages)}", "messages")
    for message in messages:
        unknown = isinstance(message, dict) and min(message.keys() - {"role", "content", "name", "type"}, default=None)
        if unknown:
            raise BadRequestError(f"a message must have a role and a content alone, got {_shown(unknown)}", "messages")
    return messages


def _prompts(prompt: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids of one or several prompts, each of them text or ids; an empty text is a BOS token."""
    several = prompt if isinstance(prompt, list) and prompt and not _is_ids(prompt) else [prompt]
    found = []
    for one in several:
        if isinstance(one, str):
            found.append(_encoded(partial(tokenizer.encode, one), "prompt") or [tokenizer.bos_id])
        elif _is_ids(one) and all(0 <= token < tokenizer.vocab_size for token in one):
            found.append(one)
        else:
            wanted = f"text, ids from 0 to {tokenizer.vocab_size - 1}, or a list of such"
            raise BadRequestError(f"prompt must be {wanted}, got {_shown(one)}", "prompt")
    return found


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _encoded(encode: Callable[[], list[int]], field: str) -> list[int]:
    """Return ids; text that has none is the request's mistake."""
    try:
        return encode()
    except ValueError as error:
        raise BadRequestError(_cut(" ".join(str(error).split()), 200), field) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no number")


def _shown(value: Any, *, quoted: bool = True) -> str:
    """Return a value as JSON, or a text as it is, cut to a part of a line."""
    if not quoted:
        return _cut(" ".join(str(value).split()))
    try:
        return _cut(json.dumps(value, ensure_ascii=True))
    except RecursionError:
        return "something deep"


def _cut(text: str, length: int = SHOWN) -> str:
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= length else f"{text[:length]}…"
