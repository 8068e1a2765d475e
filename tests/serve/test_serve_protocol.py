"""The protocol: forms of answers, streams, sampling, scores, and requests that can't be answered."""

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from serve_support import CAPACITY, Serving, chain_model

from yaongi.data.chats.encode import encode_prompt
from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi
from yaongi.model.generation import generate

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TALK = [{"role": "system", "content": "짧게 말한다."}, {"role": "user", "content": "고양이는 어디에 있니?"}]
GREEDY = {"temperature": 0, "max_tokens": 12}


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events of a stream, which ends with [DONE]."""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def whole(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return a reply that is not a stream."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ids_of(client: httpx.Client, body: dict[str, Any]) -> list[list[str]]:
    """Return the tokens of a completion's answers."""
    choices = whole(client, COMPLETION, body | {"logprobs": 0})["choices"]
    return [choice["logprobs"]["tokens"] for choice in choices]


def logprobs_of(choice: dict[str, Any]) -> list[float | None]:
    """Return the log-probabilities of a choice's tokens, of a chat or a completion."""
    scores = choice["logprobs"]
    return [entry["logprob"] for entry in scores["content"]] if "content" in scores else scores["token_logprobs"]


def test_a_chat_has_openai_s_form(client: httpx.Client, model: Yaongi, tokenizer: Tokenizer) -> None:
    reply = whole(client, CHAT, {"messages": TALK, "model": "small", **GREEDY})
    prompt = encode_prompt(TALK, tokenizer)
    answer = generate(model, [prompt], max_new_tokens=12)[0]
    (choice,) = reply["choices"]
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["model"] == "small"
    assert choice["index"] == 0
    assert choice["logprobs"] is None
    assert choice["message"] == {"role": "assistant", "content": tokenizer.decode(answer)}
    assert choice["finish_reason"] == ("length" if len(answer) == 12 else "stop")
    used = len(answer) + (choice["finish_reason"] == "stop")
    assert reply["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": used,
        "total_tokens": len(prompt) + used,
    }
    without_limit = whole(client, CHAT, {"messages": TALK, "temperature": 0})
    answer = generate(model, [prompt], max_new_tokens=CAPACITY - len(prompt))[0]
    assert without_limit["choices"][0]["message"]["content"] == tokenizer.decode(answer)


def test_a_completion_has_openai_s_form(client: httpx.Client, model: Yaongi, tokenizer: Tokenizer) -> None:
    """Of texts and of ids; an empty text begins with BOS."""
    texts = ["고양이가", "", "서울에는 바다가"]
    reply = whole(client, COMPLETION, {"prompt": texts, **GREEDY})
    ids = [tokenizer.encode(text) or [tokenizer.bos_id] for text in texts]
    answers = generate(model, ids, max_new_tokens=12)
    assert reply["object"] == "text_completion"
    assert [choice["text"] for choice in reply["choices"]] == [tokenizer.decode(answer) for answer in answers]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))
    again = whole(client, COMPLETION, {"prompt": ids, **GREEDY})
    assert again["choices"] == reply["choices"]
    assert whole(client, COMPLETION, {"prompt": ids[0], **GREEDY})["choices"] == reply["choices"][:1]
    assert whole(client, COMPLETION, {"prompt": "고양이"})["usage"]["completion_tokens"] <= 16


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("scored", [False, True], ids=["plain", "scored"])
def test_a_stream_is_the_whole(client: httpx.Client, path: str, scored: bool) -> None:
    """Text, reasons, scores and usage, of several answers at once."""
    body: dict[str, Any] = {"n": 3, "seed": 5, "max_tokens": 20, "temperature": 1.2}
    body |= {"messages": TALK} if path == CHAT else {"prompt": "고양이가", "echo": True}
    if scored:
        body |= {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    reply = whole(client, path, body)
    *found, last = events(client, path, body | {"stream_options": {"include_usage": True}})
    assert last["choices"] == []
    assert last["usage"] == reply["usage"]
    assert all(event["usage"] is None for event in found)
    assert len({event["id"] for event in found}) == 1
    texts, reasons, scores = [""] * 3, [None] * 3, [[], [], []]
    for event in found:
        (choice,) = event["choices"]
        assert event["object"] == ("chat.completion.chunk" if path == CHAT else "text_completion")
        texts[choice["index"]] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
        if choice.get("logprobs"):
            scores[choice["index"]] += logprobs_of(choice)
    for choice in reply["choices"]:
        index = choice["index"]
        assert texts[index] == (choice["message"]["content"] if path == CHAT else choice["text"])
        assert reasons[index] == choice["finish_reason"]
        if scored:
            assert scores[index] == pytest.approx(logprobs_of(choice), abs=1e-4)  # a batch of another size rounds so
    assert len(set(texts)) == 3
    if path == CHAT:
        assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_sixteen_at_once_are_sixteen_one_by_one(client: httpx.Client) -> None:
    """Greedy and sampled, in four slots."""
    prompts = ["고양이", "바다로 가는 길에", "책", "나는 오늘 아침에 학교에서 친구와 함께 그림을 그렸다"] * 4
    bodies = [
        {"prompt": prompt, "max_tokens": 5 + number, "temperature": number % 3, "seed": number}
        for number, prompt in enumerate(prompts)
    ]
    one_by_one = [whole(client, COMPLETION, body)["choices"] for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda body: whole(client, COMPLETION, body)["choices"], bodies))
    assert together == one_by_one


def test_n_answers_are_those_of_generate(client: httpx.Client, model: Yaongi, tokenizer: Tokenizer) -> None:
    """They differ from each other, and a seed gives them again; without one they are others every time."""
    body = {"prompt": "고양이가", "n": 3, "max_tokens": 10, "temperature": 1.5, "top_k": 40, "top_p": 0.9}
    reply = whole(client, COMPLETION, body | {"seed": 7})
    ids = tokenizer.encode("고양이가")
    wanted = generate(model, [ids] * 3, max_new_tokens=10, temperature=1.5, top_k=40, top_p=0.9, seed=7)
    assert [choice["text"] for choice in reply["choices"]] == [tokenizer.decode(answer) for answer in wanted]
    without = [whole(client, COMPLETION, body | {"seed": 7, "top_k": k})["choices"] for k in (-1, 10**30)]
    assert without[0] == without[1]
    unseeded = [whole(client, COMPLETION, body)["choices"][0]["text"] for _ in range(3)]
    assert len(set(unseeded)) > 1


def test_scores_are_the_model_s(client: httpx.Client, model: Yaongi, tokenizer: Tokenizer) -> None:
    """With `echo`, also those of the prompt, as lm-eval reads them."""
    ids = tokenizer.encode("고양이가 나무 아래에서 잔다. 하늘은 높다. 그래서 우리는 길을 떠났다.")
    body = {"prompt": [ids], "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    (choice,) = whole(client, COMPLETION, body)["choices"]
    scores = choice["logprobs"]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).log_softmax(-1)[0]
    wanted = [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]
    best = logprobs[-1].max()
    assert scores["token_logprobs"][0] is None
    assert scores["token_logprobs"][1:] == pytest.approx([*wanted, float(best)], abs=1e-4)
    assert scores["top_logprobs"][0] is None
    assert [max(top.values()) for top in scores["top_logprobs"][1:]] == pytest.approx(
        logprobs.max(-1).values.tolist(), abs=1e-4
    )
    assert "".join(scores["tokens"][: len(ids)]) == tokenizer.decode(ids)
    assert choice["text"].startswith(tokenizer.decode(ids))
    (entry, *_) = whole(client, CHAT, {"messages": TALK, **GREEDY, "logprobs": True, "top_logprobs": 3})["choices"][0][
        "logprobs"
    ]["content"]
    assert entry["token"].encode() == bytes(entry["bytes"])
    assert len(entry["top_logprobs"]) == 3
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]


def test_a_syllable_is_never_split(serve: Serving, tokenizer: Tokenizer) -> None:
    """Its bytes are three tokens, and no event holds a part of it."""
    start = tokenizer.piece_to_id("<|step|>")
    byte = {value: tokenizer.piece_to_id(f"<0x{value:02X}>") for value in "가냥".encode()}
    chain = [start, *(byte[value] for value in "가냥".encode()), tokenizer.eos_id]
    with serve(chain_model(tokenizer, chain)) as client:
        found = events(client, COMPLETION, {"prompt": [start], **GREEDY})
        texts = [event["choices"][0]["text"] for event in found]
        assert "".join(texts) == "가냥"
        assert all(text in ("", "가", "냥", "가냥") for text in texts)
        cut = whole(client, COMPLETION, {"prompt": [start], "temperature": 0, "max_tokens": 5})
        assert cut["choices"][0] == {"index": 0, "text": "가\ufffd\ufffd", "logprobs": None, "finish_reason": "length"}
        scores = whole(client, COMPLETION, {"prompt": [start], **GREEDY, "logprobs": 0})["choices"][0]["logprobs"]
        assert scores["tokens"] == [*(f"bytes:\\x{value:02x}" for value in "가냥".encode()), "<|eos|>"]


def test_a_stop_string_ends_an_answer(serve: Serving, tokenizer: Tokenizer) -> None:
    """Also one that several tokens make; what only begins like one is given out later."""
    letters = [tokenizer.piece_to_id(f"<0x{ord(letter):02X}>") for letter in "abcdefg"]
    with serve(chain_model(tokenizer, [*letters, tokenizer.eos_id])) as client:
        for stop, text, reason in (
            ("de", "bc", "stop"),
            (["xyz", "ef"], "bcd", "stop"),
            ("dex", "bcdefg", "stop"),
            (["g"], "bcdef", "stop"),
            ("b", "", "stop"),
            ("gx", "bcdef", "length"),
        ):
            limit = 5 if reason == "length" else 12
            body = {"prompt": letters[:1], "temperature": 0, "max_tokens": limit, "stop": stop}
            (choice,) = whole(client, COMPLETION, body)["choices"]
            assert (choice["text"], choice["finish_reason"]) == (text, reason), stop
            found = events(client, COMPLETION, body)
            assert "".join(event["choices"][0]["text"] for event in found) == text
            assert found[-1]["choices"][0]["finish_reason"] == reason


MESSAGE = {"messages": [{"role": "user", "content": "a"}]}
DEEP = "[" * 100_000
BAD: list[tuple[str, Any, int, str]] = [
    (CHAT, b"{", 400, "body must be JSON in UTF-8, got "),
    (CHAT, b"\xff\xfe", 400, "body must be JSON in UTF-8, got "),
    (CHAT, DEEP.encode(), 400, "body must be JSON in UTF-8, got too deep"),
    (CHAT, b'{"temperature": NaN}', 400, "body must be JSON in UTF-8, got NaN, which is no number"),
    (CHAT, [1], 400, "body must be a JSON object, got [1]"),
    (CHAT, {}, 400, "messages must be a list of one or more, got null"),
    (CHAT, {"messages": []}, 400, "messages must be a list of one or more, got []"),
    (CHAT, {"messages": ["a"]}, 400, "chat: every message must be an object, got str"),
    (CHAT, {"messages": [{"content": "a"}]}, 400, "chat: every message must have a role, got keys ['content']"),
    (CHAT, {"messages": [{"role": "cat", "content": "a"}]}, 400, "chat: role must be one of system, user, "),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "chat: content must be text or a list of parts, got"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "chat: content must be text or a list of parts, got null"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "x\ud800": 1}]}, 400, "a message must have a role and a "),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, ""),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "chat: a part of a message "),
    (CHAT, {**MESSAGE, "temperature": 2.1}, 400, "temperature must be a number from 0 to 2, got 2.1"),
    (CHAT, {**MESSAGE, "temperature": "hot"}, 400, 'temperature must be a number from 0 to 2, got "hot"'),
    (CHAT, {**MESSAGE, "temperature": True}, 400, "temperature must be a number from 0 to 2, got true"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', 400, "temperature must be "),
    (CHAT, {**MESSAGE, "top_p": 0}, 400, "top_p must be above 0, got 0.0"),
    (CHAT, {**MESSAGE, "top_k": 1.5}, 400, "top_k must be a whole number from -1 on, got 1.5"),
    (CHAT, {**MESSAGE, "max_tokens": 0}, 400, "max_tokens must be a whole number from 1 on, got 0"),
    (CHAT, {**MESSAGE, "max_tokens": 10**400}, 400, "max_tokens must be at most "),
    (CHAT, {**MESSAGE, "max_completion_tokens": -1}, 400, "max_completion_tokens must be a whole number from 1 on"),
    (CHAT, {**MESSAGE, "n": 0}, 400, "n must be a whole number from 1 to 128, got 0"),
    (CHAT, {**MESSAGE, "seed": "a"}, 400, "seed must be a whole number from "),
    (CHAT, {**MESSAGE, "stop": [""]}, 400, "stop must be a string of 1 to 1,000 characters, or at most 32 of them"),
    (CHAT, {**MESSAGE, "stop": ["a"] * 33}, 400, "stop must be a string of 1 to 1,000 characters, or at most 32 of"),
    (CHAT, {**MESSAGE, "stream": "yes"}, 400, 'stream must be true or false, got "yes"'),
    (CHAT, {**MESSAGE, "stream_options": {}}, 400, "stream_options must come with stream: true, got them alone"),
    (CHAT, {**MESSAGE, "stream": True, "stream_options": 1}, 400, "stream_options must be "),
    (CHAT, {**MESSAGE, "top_logprobs": 2}, 400, "top_logprobs must come with logprobs: true, got it alone"),
    (CHAT, {**MESSAGE, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs must be a whole number from 0 to 20"),
    (CHAT, {**MESSAGE, "tools": [{"type": "function"}]}, 400, "tools must be [] or absent, got "),
    (CHAT, {**MESSAGE, "frequency_penalty": 0.5}, 400, "frequency_penalty must be 0 or absent, got 0.5"),
    (CHAT, {**MESSAGE, "temprature": 1}, 400, 'fields must be those of the documentation, got "temprature"'),
    (CHAT, {**MESSAGE, "model": "gpt-4"}, 404, 'model must be small, got "gpt-4"'),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "고양이 " * 200}]},
        400,
        "messages must be at most 255 tokens long",
    ),
    (COMPLETION, {"prompt": [5] * 256}, 400, "prompt must be at most 255 tokens long, got 256"),
    (COMPLETION, {}, 400, "prompt must be text, ids from 0 to 1023, or a list of such, got null"),
    (COMPLETION, {"prompt": []}, 400, "prompt must be text, ids from 0 to 1023, or a list of such, got []"),
    (COMPLETION, {"prompt": [1024]}, 400, "prompt must be text, ids from 0 to 1023, or a list of such, got [1024]"),
    (COMPLETION, {"prompt": [True]}, 400, "prompt must be text, ids from 0 to 1023, or a list of such, got true"),
    (COMPLETION, {"prompt": ["a", 5]}, 400, "prompt must be text, ids from 0 to 1023, or a list of such, got 5"),
    (COMPLETION, {"prompt": ["a"] * 129}, 400, "prompts times n must be at most 128, got 129 times 1"),
    (COMPLETION, {"prompt": "a", "suffix": "b"}, 400, 'suffix must be "" or absent, got "b"'),
    (COMPLETION, {"prompt": "a", "max_tokens": 256}, 400, "max_tokens must be at most 255 (256 less the prompt's 1)"),
    (COMPLETION, {"prompt": "a" * 1_000_001}, 413, "body must be at most 1,000,000 bytes, got more"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_a_bad_request_is_one_line(client: httpx.Client, path: str, body: Any, status: int, message: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    error = response.json()["error"]
    assert error["message"].startswith(message), error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert len(error["message"]) < 300
    assert (error["code"] == "context_length_exceeded") == (
        "_tokens must be at most" in message or "tokens long" in message
    )


FIELDS = ["model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n"]
FIELDS += ["seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "tools", "tool_choice"]
FIELDS += ["response_format", "suffix", "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "user"]
VALUES = [None, True, False, 0, -1, 1, 2, 2**70, -0.0, 0.5, 1e308, 1e-320, "", "a", "\ud800", "small", [], [1]]
VALUES += [[[1], [2, 3]], ["a", "b"], [{"role": "user", "content": "a"}], {}, {"include_usage": True}, {"type": "text"}]


def test_no_body_makes_the_server_fail(client: httpx.Client) -> None:
    """Random fields with random values: each is answered, or refused in one line."""
    draw, seen = random.Random(4), Counter[int]()
    for number in range(250):
        path = (CHAT, COMPLETION)[number % 2]
        body = {"max_tokens": 2} | (MESSAGE if path == CHAT else {"prompt": "a"})
        body |= {draw.choice(FIELDS): draw.choice(VALUES) for _ in range(1 + number % 2)}
        headers = {"Content-Type": "application/json"}
        reply = client.post(path, content=json.dumps(body).encode(), headers=headers)
        seen[reply.status_code] += 1
        assert reply.status_code in (200, 400, 404), (body, reply.text)
        if reply.status_code != 200:
            assert "\n" not in reply.json()["error"]["message"]
    assert seen[200] > 10
    assert seen[400] > 100
    assert client.get("/health").json()["running"] == 0


def test_other_requests_are_refused_in_the_same_form(client: httpx.Client) -> None:
    for response, status, message in (
        (client.get("/v2/models"), 404, 'there is no "/v2/models"'),
        (client.get(CHAT), 405, '"/v1/chat/completions" does not take GET'),
        (client.delete("/v1/models"), 405, '"/v1/models" does not take DELETE'),
        (client.post(CHAT, content=b"{}"), 415, "Content-Type must be application/json, got none"),
        (client.post(CHAT, data={"a": "b"}), 415, "Content-Type must be application/json, got application/x-www-form-"),
        (client.get("/health", headers={"Host": "evil.example:80"}), 400, "Host must be localhost, 127.0.0.1, [::1]"),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"].startswith(message), response.text
    assert client.get(CHAT).headers["allow"] == "POST"
    assert client.get("/health", headers={"Host": "localhost"}).json() == {"status": "ok", "running": 0, "waiting": 0}
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("small", CAPACITY)
