"""Small models, and a server on loopback in a thread of this process."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from models import SIZES, save_model
from serve_support import CAPACITY, Serving

from yaongi.data.pieces import END_OF_TURN
from yaongi.data.sources.embedded.korean import korean_documents
from yaongi.data.tokenizer import Tokenizer, train_tokenizer
from yaongi.model import EngramConfig, ModelConfig, Yaongi
from yaongi.serve.app import make_app
from yaongi.serve.engine import Limits
from yaongi.serve.server import listen, make_service


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Return a tokenizer of Korean, with 1,024 pieces."""
    return train_tokenizer(list(korean_documents(0, 120)), 1024, say=lambda _: None)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Yaongi:
    """Return a model with random weights that prefers some tokens, and ends answers as a tuned one does."""
    engram = EngramConfig(layer=1, heads=2, head_dim=8, rows=50, orders=(2, 3))
    config = ModelConfig.from_dict(
        SIZES
        | {"pattern": "MEM*ME", "vocab_size": tokenizer.vocab_size, "max_sequence_length": CAPACITY}
        | {"engram": (engram,), "stop_token_ids": (tokenizer.piece_to_id(END_OF_TURN),)}
    )
    made = Yaongi(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return made


@pytest.fixture(scope="session")
def folder(model: Yaongi, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of this model."""
    return save_model(model, tokenizer, tmp_path_factory.mktemp("served") / "small")


@pytest.fixture(scope="session")
def serve(tokenizer: Tokenizer) -> Serving:
    """Return a context that serves a model, and gives a client of it."""

    @contextlib.contextmanager
    def serving(model: Yaongi, limits: Limits | None = None, **options: Any) -> Iterator[httpx.Client]:
        limits = limits or Limits(slots=4, capacity=CAPACITY, chunk=32, queue=64)
        app = make_app(make_service(model, tokenizer, "small", limits, **options))
        listening = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()

    return serving


@pytest.fixture(scope="module")
def client(serve: Serving, model: Yaongi) -> Iterator[httpx.Client]:
    """Return a client of the random model."""
    with serve(model) as client:
        yield client
