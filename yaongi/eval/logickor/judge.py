"""A judge behind an OpenAI-compatible URL, and what it said, on disk at once: no reply is ever asked for twice."""

import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

TRIES = 5
LONGEST_WAIT = 120.0  # seconds between two tries, whatever the server asks for
HOPELESS = (401, 403, 404)  # the same for every question: key, rights, URL or model


@dataclass(frozen=True)
class Asked:
    """One score to ask for."""

    mode: str
    id: int
    turn: str
    messages: Sequence[dict[str, str]]

    def key(self, judge: str) -> str:
        """A hash of all that decides the reply."""
        return hashlib.sha256(json.dumps([judge, self.messages]).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """What came of one: the judge's text, or why there is none."""

    key: str
    mode: str
    id: int
    turn: str
    judge: str
    text: str | None
    error: str | None


class NoReplyError(Exception):
    """The judge could not be reached, or answered with an error, until patience ended."""


@dataclass(frozen=True)
class Judge:
    """An endpoint."""

    url: str  # up to /v1; /chat/completions is added
    name: str  # of the model
    key: str = ""  # sent, and never written or printed
    timeout: float = 120.0  # seconds
    sleep: Callable[[float], None] = time.sleep

    def ask(self, messages: Sequence[dict[str, str]]) -> str:
        """Return the reply. Tries again on 429, errors of the server, broken connections and silence.

        Raises:
            ValueError: the server refuses key, rights, URL or model: asking on is no use.
            NoReplyError: there is no reply, or none of the known form.
        """
        body = json.dumps({"model": self.name, "temperature": 0, "n": 1, "messages": list(messages)}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        for number in range(1, TRIES + 1):
            wait = min(LONGEST_WAIT, 2.0 ** (number - 1))
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    return _content(response.read())
            except urllib.error.HTTPError as error:
                what = f"status {error.code}"
                if error.code in HOPELESS:
                    raise ValueError(
                        f"logickor: --url must be one that takes the key and has {self.name}, got {what}"
                    ) from None
                if error.code != 429 and error.code < 500:
                    raise NoReplyError(what) from None
                wait = min(LONGEST_WAIT, _asked_wait(error.headers.get("Retry-After"), wait))
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", error)
                what = "time-out" if isinstance(reason, TimeoutError) else type(reason).__name__
            if number < TRIES:
                self.sleep(wait)
        raise NoReplyError(f"{what}, {TRIES} times")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key goes to the given host alone."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def ask_all(asked: Iterable[Asked], judge: Judge, file: Path, at_once: int, say: Callable[[str], None]) -> list[Reply]:
    """Return what came of each; replies that the file holds are not asked for again.

    Args:
        file: JSON lines, appended to as soon as a reply is there.

    Raises:
        ValueError: the server refuses all.
    """
    wanted = list(asked)
    held = _read(file)
    found = {one.key(judge.name): held[one.key(judge.name)] for one in wanted if one.key(judge.name) in held}
    todo = list({one.key(judge.name): one for one in wanted if one.key(judge.name) not in found}.items())
    if found:
        say(f"going on: {len(found)} of {len(wanted)} replies are in {file}")
    with ThreadPoolExecutor(at_once) as pool, file.open("a", encoding="utf-8") as out:
        futures = [pool.submit(_ask, judge, key, one) for key, one in todo]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                reply = future.result()
                out.write(json.dumps(asdict(reply), ensure_ascii=False) + "\n")
                out.flush()
                found[reply.key] = reply
                if number % 20 == 0:
                    say(f"judged {number} of {len(todo)}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    keys = [one.key(judge.name) for one in wanted]
    return [_as(found[key], one) for key, one in zip(keys, wanted, strict=True)]


def _ask(judge: Judge, key: str, one: Asked) -> Reply:
    try:
        text, error = judge.ask(one.messages), None
    except NoReplyError as failure:
        text, error = None, str(failure)
    return Reply(key, one.mode, one.id, one.turn, judge.name, text, error)


def _as(reply: Reply, one: Asked) -> Reply:
    """Return a reply under another question's name: equal questions and answers are asked once."""
    return Reply(reply.key, one.mode, one.id, one.turn, reply.judge, reply.text, reply.error)


def _read(file: Path) -> dict[str, Reply]:
    """Read the replies of a file, not what ended without one: that is asked for again. A torn last line is ended."""
    if not file.is_file():
        return {}
    content = file.read_text(encoding="utf-8", errors="replace")
    if content and not content.endswith("\n"):
        with file.open("a", encoding="utf-8") as out:
            out.write("\n")
    found = {}
    for line in content.split("\n"):
        try:
            reply = Reply(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if reply.text is not None:
            found[reply.key] = reply
    return found


def _content(body: bytes) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise NoReplyError("a reply of an unknown form") from None
    if not isinstance(content, str):
        raise NoReplyError("a reply without text")
    return content


def _asked_wait(header: str | None, otherwise: float) -> float:
    """Return the seconds that a `Retry-After` asks for, given as such or as a date."""
    if header is None:
        return otherwise
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return otherwise
