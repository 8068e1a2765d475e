"""The server: keys, clients that hang up, a full queue, memory, and the command with its stop."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from serve_support import CAPACITY, Serving, until

from yaongi.model import Yaongi
from yaongi.serve.__main__ import Serve
from yaongi.serve.engine import Engine, Limits
from yaongi.serve.server import listen

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
LONG = {"prompt": "고양이", "temperature": 1, "max_tokens": 120, "stop": None}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
KEY = "a-secret-that-no-one-prints"


@contextlib.contextmanager
def started(folder: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command on a free port; give its process and its URL once it is up."""
    program = [sys.executable, "-m", "yaongi.serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT | environment
    )
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        found = re.fullmatch(r"small is served at (http://127\.0\.0\.1:\d+)\n", lines[1])
        assert found, lines
        assert re.fullmatch(r"[\d,]+ parameters in float32, [\d.]+ MB; \d slots of 256 tokens, [\d.]+ MB\n", lines[0])
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


def running(client: httpx.Client) -> tuple[int, int]:
    """Return how many answers run, and how many wait."""
    load = client.get("/health").json()
    return load["running"], load["waiting"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(serve: Serving, model: Yaongi, stream: bool) -> None:
    """Its answers leave, those that wait too, and another client is answered."""
    with serve(model, Limits(slots=1, capacity=CAPACITY)) as client:
        body = json.dumps({**LONG, "n": 20, "stream": stream}).encode()
        for _ in range(2):
            with socket.create_connection((client.base_url.host, client.base_url.port)) as other:
                head = f"POST {COMPLETION} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                other.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                until(lambda: sum(running(client)) > 10)
            until(lambda: running(client) == (0, 0))
        reply = client.post(COMPLETION, json={"prompt": "고양이", "max_tokens": 2}).json()
        assert reply["choices"][0]["finish_reason"]


def test_a_client_that_hangs_up_in_its_body_is_nothing(serve: Serving, model: Yaongi) -> None:
    with serve(model) as client:
        for sent in (b"", b"POST", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"):
            with socket.create_connection((client.base_url.host, client.base_url.port)) as other:
                other.sendall(sent)
        with socket.create_connection((client.base_url.host, client.base_url.port)) as other:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            other.sendall(f"{head}Content-Length: 100\r\n\r\nabc".encode())
        assert client.get("/health").status_code == 200


def test_a_full_queue_is_503(serve: Serving, model: Yaongi) -> None:
    """With the time after which to try again; what waits is answered all the same."""
    with serve(model, Limits(slots=1, capacity=CAPACITY, queue=2)) as client:
        replies: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: replies.append(client.post(COMPLETION, json=LONG))) for _ in range(3)
        ]
        for number, thread in enumerate(threads, 1):
            thread.start()
            until(lambda number=number: sum(running(client)) == number or bool(replies))
        assert not replies, "they ended too soon"
        refused = client.post(COMPLETION, json=LONG)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["message"] == "the queue is full: try again later"
        for thread in threads:
            thread.join()
        assert [reply.status_code for reply in replies] == [200] * 3


def test_a_key_is_asked_for_and_a_stop_lets_answers_end(folder: Path) -> None:
    """The key is never shown. After the signal streams run to their ends, nobody is let in, and the status is 0."""
    right = {"Authorization": f"Bearer {KEY}"}
    with started(folder, "--slots", "2", YAONGI_API_KEY=KEY) as (process, url):
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            refusals = []
            for given in (None, "Bearer other", KEY, "Bearer ü"):
                encoded = {} if given is None else {"Authorization": given.encode()}
                refusals.append(client.get("/v1/models", headers=encoded))
                refusals.append(client.post(CHAT, content=b"{", headers=encoded))
            assert {reply.status_code for reply in refusals} == {401}
            assert {reply.headers["www-authenticate"] for reply in refusals} == {"Bearer"}
            assert client.get("/health").status_code == client.get("/").status_code == 200
            body = {**LONG, "n": 4, "stream": True}
            with client.stream("POST", COMPLETION, json=body, headers=right) as response:
                lines = response.iter_lines()
                first = next(lines)
                process.send_signal(signal.SIGTERM)
                found = [first, *(line for line in lines if line)]
            with pytest.raises(httpx.TransportError):
                client.get("/health")
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0
    assert found[-1] == "data: [DONE]"
    ends = [json.loads(line.removeprefix("data: "))["choices"][0] for line in found[:-1]]
    assert sorted(end["index"] for end in ends if end["finish_reason"]) == list(range(4))
    assert "401" in output
    assert KEY not in output + "".join(reply.text for reply in refusals)


def test_small_packets_are_sent_at_once() -> None:
    with (
        listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_page_asks_no_one_else(serve: Serving, model: Yaongi) -> None:
    with serve(model) as client:
        reply = client.get("/")
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert not re.search(r"(?:src|href)\s*=|https?://|innerHTML|@import", reply.text)


@pytest.mark.long
def test_a_stop_waits_no_longer_than_its_grace(folder: Path) -> None:
    with started(folder, "--slots", "1", "--grace", "1") as (process, url):
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            with client.stream("POST", COMPLETION, json={**LONG, "n": 128, "stream": True}) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGINT)
                began = time.monotonic()
                with contextlib.suppress(httpx.TransportError):
                    assert "data: [DONE]" not in list(lines)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"max_sequence_length": 257}, "serve: max_sequence_length must be 2 to 256, the model's, got 257"),
        ({"slots": -1}, "serve: slots must be 0 or more, got -1"),
        ({"chunk": -1}, "serve: chunk must be 0 or more, got -1"),
        ({"device": "tpu"}, "serve: device must be auto, cpu, gpu, cuda or cuda:N, got 'tpu'"),
        ({"host": "192.0.2.1"}, "serve: host and port must be free, got 192.0.2.1 and 0: "),
        ({"port": 70_000}, "serve: port must be 0 to 65535, got 70000"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}") as raised:
        Serve(folder, **({"port": 0} | options)).run()
    assert "\n" not in str(raised.value)


def test_what_is_recorded_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(Engine, "warm_up", lambda self: [64, 4095])
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    Serve(folder, port=0).run()
    assert re.search(
        r"^recorded as CUDA graphs in \d+\.\d s: prompts of up to 4,095 tokens$", capsys.readouterr().out, re.M
    )


def test_too_little_memory_to_read_prompts_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Engine) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    monkeypatch.setattr(Engine, "warm_up", fail)
    wanted = "memory must have room to read 16 tokens at a time beside weights and caches, got too little"
    with pytest.raises(MemoryError, match=f"^serve: {wanted}: a smaller --chunk, or fewer --slots$"):
        Serve(folder, port=0, chunk=16).run()


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_a_missing_package_is_one_line(folder: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else name)
    wanted = rf"^{missing} must be installed \(pip install 'yaongi\[serve\]'\), got none$"
    with pytest.raises(ValueError, match=wanted):
        Serve(folder).run()


def test_a_failed_engine_ends_the_server(folder: Path, tmp_path: Path) -> None:
    """The request gets an error, and the command a line and status 1."""
    (tmp_path / "sitecustomize.py").write_text(
        "import yaongi.serve.engine as e\n"
        "def work(self): raise RuntimeError('the GPU\\nis gone')\n"
        "e.Engine.work = work\n"
    )
    with started(folder, PYTHONPATH=str(tmp_path)) as (process, url):
        with contextlib.suppress(httpx.TransportError):
            reply = httpx.post(f"{url}{COMPLETION}", json=LONG, trust_env=False)
            assert reply.status_code == 500
            assert reply.json()["error"]["message"] == "the engine has failed: the GPU is gone"
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "error: serve: the engine has failed: the GPU is gone\n" in output


def load(client: httpx.Client, bad: int, good: int) -> None:
    """Send bad requests of all kinds, and good ones between them."""
    every = bad // good
    kinds: list[Any] = [b"{", b"", {"prompt": 5}, {"prompt": "a", "n": "x"}, {"prompt": "x" * 3000}, {"oops": 1}]
    for number in range(bad):
        body = kinds[number % len(kinds)]
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/json" if number % 7 else "text/plain"
        reply = client.post((CHAT, COMPLETION)[number % 2], content=content, headers={"Content-Type": kind})
        assert 400 <= reply.status_code < 500
        assert reply.json()["error"]["message"]
        if number % every == 0:
            answer = client.post(COMPLETION, json={"prompt": "고양이", "max_tokens": 4, "n": 2})
            assert answer.status_code == 200


@pytest.mark.parametrize(
    ("bad", "good"), [(150, 15), pytest.param(10_000, 1_000, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_memory_stays_flat(folder: Path, bad: int, good: int) -> None:
    """After as much load to warm up; a leak of 16 kB a request would show, in the long form one of 200 bytes."""
    with started(folder) as (process, url), httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        reader = threading.Thread(target=process.stdout.read)  # type: ignore[union-attr]
        reader.start()
        load(client, bad, good)
        before = psutil.Process(process.pid).memory_info().rss
        load(client, bad, good)
        grown = psutil.Process(process.pid).memory_info().rss - before
        assert grown < 2_400_000, grown
        assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
        process.terminate()
        assert process.wait(30) == 0
        reader.join()
