"""The server with `yaongi-4b` in bfloat16: answers at once beside `generate`'s batch, and the first token of a prompt.

The command runs as a process of its own, as a user starts it, and the requests come from this one. Weights are initial
ones, and the tokens of answers are counted as the server reports them: one may end by itself.
"""

import contextlib
import gc
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from measure import report

from yaongi.data.sources.embedded.korean import korean_documents
from yaongi.data.tokenizer import Tokenizer, train_tokenizer
from yaongi.model import Yaongi, load_preset
from yaongi.model.generation import generate

PRESET = "yaongi-4b"
AT_ONCE, PROMPT, ANSWER = 64, 128, 512  # requests, and tokens of each
LONG_PROMPT, CALLS = 1000, 9
SHARE = 0.8  # of the rate of `generate` that the server must reach
FIRST_TOKEN_MS = 100.0


@dataclass(frozen=True)
class Served:
    """A model, and the address at which it is served."""

    model: Yaongi
    url: str


@contextlib.contextmanager
def served(model: Yaongi, tokenizer: Tokenizer, folder: Path, *options: str) -> Iterator[Served]:
    """Save a model, and serve it by the command until the context ends."""
    model.save_pretrained(folder)
    tokenizer.save(folder)
    program = [sys.executable, "-m", "yaongi.serve", str(folder), "--port", "0", "--name", "served", *options]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        said = ""
        while not (found := re.search(r"^served is served at (http://\S+)\n", said, re.MULTILINE)):
            line = process.stdout.readline()
            assert line, said
            said += line
        print(said, end="")
        threading.Thread(target=process.stdout.read, daemon=True).start()  # its log, which would fill the pipe
        yield Served(model, found[1])
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def flagship(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve the preset with the vocabulary of a tokenizer of our own text."""
    tokenizer = train_tokenizer(list(korean_documents(0, 4_000)), 32_768)
    config = load_preset(PRESET, vocab_size=tokenizer.vocab_size)
    model = Yaongi(config, device="cuda", dtype=torch.bfloat16).eval()
    with served(model, tokenizer, tmp_path_factory.mktemp("served") / "model") as running:
        yield running
    gc.collect()
    torch.cuda.empty_cache()


def prompts_of(model: Yaongi, count: int, length: int) -> list[list[int]]:
    """Return random prompts."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(4, model.config.vocab_size, (count, length), generator=random).tolist()


def generated_rate(model: Yaongi, prompts: list[list[int]], answer: int) -> float:
    """Return the tokens per second of `generate`'s steps: those of two lengths give the time of a step."""
    seconds = {}
    for length in (answer // 4, answer):
        for _ in range(2):  # the first call compiles
            began = time.perf_counter()
            answers = generate(model, prompts, max_new_tokens=length, stop=())
            seconds[length] = time.perf_counter() - began
        assert all(len(tokens) == length for tokens in answers)
    return len(prompts) * (answer - answer // 4) / (seconds[answer] - seconds[answer // 4])


def served_rate(url: str, prompts: list[list[int]], answer: int) -> float:
    """Return the tokens per second of requests that come at once, from the first one's start to the last one's end.

    They share a client: making one for each takes 2 s in all.
    """
    limits = httpx.Limits(max_connections=len(prompts))
    with (
        httpx.Client(base_url=url, trust_env=False, timeout=600, limits=limits) as client,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):

        def ask(prompt: list[int]) -> int:
            reply = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": answer, "temperature": 0})
            assert reply.status_code == 200, reply.text
            return reply.json()["usage"]["completion_tokens"]

        began = time.perf_counter()
        tokens = sum(pool.map(ask, prompts))
    return tokens / (time.perf_counter() - began)


def first_token_ms(url: str, prompt: list[int]) -> float:
    """Return the milliseconds until the first event of a stream comes."""
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True, "logprobs": 0}
    with httpx.Client(base_url=url, trust_env=False, timeout=600) as client:
        client.get("/health")
        began = time.perf_counter()
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(line for line in response.iter_lines() if line.startswith("data: {"))
            return 1e3 * (time.perf_counter() - began)


def test_answers_at_once(flagship: Served, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """The rate of requests that come at once, reading of prompts included, beside the rate of `generate`'s steps."""
    prompts = prompts_of(flagship.model, AT_ONCE, PROMPT)
    for _ in range(2):  # graphs are recorded, of readings at the second time
        served_rate(flagship.url, prompts, 2 * PROMPT)
    found = max(served_rate(flagship.url, prompts, ANSWER) for _ in range(3))
    alone = generated_rate(flagship.model, prompts, ANSWER)
    report(benchmark, request, {"tokens_per_s": found, "generate_tokens_per_s": alone, "share": found / alone})
    assert found >= SHARE * alone


def test_the_first_token(flagship: Served, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """The time to the first token of a long prompt, while nothing else runs."""
    (prompt,) = prompts_of(flagship.model, 1, LONG_PROMPT)
    first_token_ms(flagship.url, prompt)
    found = statistics.median(first_token_ms(flagship.url, prompt) for _ in range(CALLS))
    report(benchmark, request, {"ms": found, "prompt_tokens": LONG_PROMPT})
    assert found <= FIRST_TOKEN_MS
